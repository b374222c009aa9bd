from tests.support.tiny_model import one_thread

__all__ = ["one_thread"]
