import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmscale.distributed.seeds import mix, seed_step

parts = st.lists(st.one_of(st.integers(), st.text(max_size=4)), max_size=4).map(tuple)


@given(parts, parts)
@settings(max_examples=100)
def test_mix_tells_every_two_inputs_apart(one, other):
    assert (mix(*one) == mix(*other)) == (
        [(type(part), part) for part in one] == [(type(part), part) for part in other]
    )


def test_mix_is_fixed_forever():
    assert mix(0) == 4_774_516_902_939_907_285
    assert mix("decoder.norm.weight", 7) == 8_737_449_980_967_284_014


def test_mix_fits_torch_and_numpy_seeds():
    assert all(0 <= mix(n) < 2**63 for n in range(1000))


def test_a_step_draws_the_same_again_and_no_two_streams_agree():
    def draw(*place: int) -> tuple[float, ...]:
        seed_step(*place)
        return tuple(torch.rand(4).tolist())

    places = [(s, t, d, p) for s in (0, 1) for t in (1, 2) for d in (0, 1) for p in (0, 1)]
    assert [draw(*place) for place in places] == [draw(*place) for place in places]
    assert len({draw(*place) for place in places}) == len(places)
