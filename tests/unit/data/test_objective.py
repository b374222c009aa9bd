import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lmscale.base.batch import Batch
from lmscale.data.objective import Record, causal_batch, record_tokens

ROWS = st.integers(1, 4)


@st.composite
def records(draw: st.DrawFn) -> tuple[list[Record], int, int]:
    seq_len = draw(st.integers(1, 12))
    count = draw(st.integers(0, 4))
    made = []
    for _ in range(count):
        tokens = draw(st.lists(st.integers(0, 500), min_size=seq_len + 1, max_size=seq_len + 1))
        starts = sorted(draw(st.sets(st.integers(1, seq_len))))
        made.append(Record(np.array(tokens), np.array(starts, np.int64)))
    return made, seq_len, count + draw(st.integers(0, 2)) or 1


def build(case: tuple[list[Record], int, int], documents: str) -> Batch[np.ndarray]:
    made, seq_len, rows = case
    positions = np.arange(100, 100 + len(made))
    return causal_batch(
        made, rows=rows, sample_positions=positions, seq_len=seq_len, documents=documents
    )


@settings(max_examples=60, deadline=None)
@given(records())
def test_separate_equals_the_definition_token_by_token(
    case: tuple[list[Record], int, int],
) -> None:
    batch = build(case, "separate")
    assert batch.inputs.documents_BL is not None
    for row, record in enumerate(case[0]):
        starts = set(record.starts.tolist())
        document = position = 0
        for i in range(case[1]):
            if i in starts:
                document, position = document + 1, 0
            assert batch.inputs.tokens_BL[row, i] == record.tokens[i]
            assert batch.inputs.documents_BL[row, i] == document
            assert batch.inputs.positions_BL[row, i] == position
            assert batch.targets_BL[row, i] == record.tokens[i + 1]
            assert batch.weights_BL[row, i] == (i + 1 not in starts)
            position += 1


@settings(max_examples=30, deadline=None)
@given(records())
def test_joined_is_one_text(case: tuple[list[Record], int, int]) -> None:
    batch = build(case, "joined")
    filled = len(case[0])
    assert batch.inputs.documents_BL is None
    assert (batch.inputs.positions_BL == np.arange(case[1])).all()
    assert (batch.weights_BL[:filled] == 1).all()


@settings(max_examples=30, deadline=None)
@given(records(), st.sampled_from(["separate", "joined"]))
def test_fillers_weigh_nothing_and_records_can_be_rebuilt(
    case: tuple[list[Record], int, int], documents: str
) -> None:
    batch = build(case, documents)
    filled = len(case[0])
    assert (batch.rows_B[:filled] == np.arange(100, 100 + filled)).all()
    assert (batch.rows_B[filled:] == -1).all()
    assert not batch.weights_BL[filled:].any()
    if batch.inputs.documents_BL is not None:
        assert (batch.inputs.documents_BL[filled:] == -1).all()
    for row, record in enumerate(case[0]):
        assert (record_tokens(batch, row) == record.tokens).all()
