"""Parameters as arrays: what they are checked for, and what their digest depends on."""

import numpy as np
import pytest
import torch
from torch import nn

from lepton_fl.errors import ProtocolError
from lepton_fl.tasks import arrays_of, check_like, load_arrays, model_hash
from lepton_fl.tasks.arrays import TILE


@pytest.fixture
def arrays():
    rng = np.random.default_rng(1)
    return {
        "a": rng.normal(size=(2, 3)).astype(np.float32),
        "b": rng.normal(size=4).astype(np.float32),
    }


# --- digest ---


def test_the_order_of_the_names_does_not_matter(arrays):
    """A digest over the model, not over how a mapping was filled."""
    assert model_hash(dict(reversed(arrays.items()))) == model_hash(arrays)


def test_any_bit_matters(arrays):
    """Each bit of each number."""
    seen = {model_hash(arrays)}
    for name in arrays:
        for position in range(arrays[name].nbytes * 8):
            raw = bytearray(arrays[name].tobytes())
            raw[position // 8] ^= 1 << position % 8
            changed = np.frombuffer(bytes(raw), np.float32).reshape(arrays[name].shape)
            seen.add(model_hash({**arrays, name: changed}))

    assert len(seen) == 1 + (6 + 4) * 32


def test_name_shape_and_type_matter(arrays):
    """The same bytes under another name, in another shape or as another type are another model."""
    a, b = arrays["a"], arrays["b"]
    variants = [
        arrays,
        {"a": a, "c": b},
        {"a": b, "b": a},
        {"a": a},
        {"a": a.reshape(3, 2), "b": b},
        {"a": a.reshape(6), "b": b},
        {"a": a.view(np.int32), "b": b},
        {"a": a.astype(np.float64), "b": b},
        {"a": a, "b": b, "c": b[:0]},
        {"ab": np.concatenate([a.ravel(), b])},
    ]

    assert len({model_hash(v) for v in variants}) == len(variants)


def test_names_cannot_run_into_each_other():
    """Lengths are part of what is hashed."""
    one = np.zeros(1, np.float32)

    assert model_hash({"a|<f4|1|4\n": one}) != model_hash({"a": one})
    assert model_hash({"x": one, "y": one}) != model_hash({"xy": one, "": one})


def test_memory_layout_does_not_matter(arrays):
    """Byte order and strides are the machine's, not the model's."""
    a = arrays["a"]

    assert model_hash({"a": np.asfortranarray(a)}) == model_hash({"a": a})
    assert model_hash({"a": a.astype(">f4")}) == model_hash({"a": a})


# --- check ---


def test_arrays_like_the_template_pass(arrays):
    """Values may be any finite ones."""
    check_like({name: -a for name, a in arrays.items()}, arrays)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda a: {"a": a["a"]}, r"missing \['b'\]"),
        (lambda a: {**a, "c": a["b"]}, r"extra \['c'\]"),
        (lambda a: {"b": a["b"], "a": a["a"]}, "names differ"),
        (lambda a: {**a, "b": a["b"][:3]}, r"b has shape \(3,\), model has \(4,\)"),
        (lambda a: {**a, "a": a["a"].T}, r"a has shape \(3, 2\)"),
        (lambda a: {**a, "b": a["b"].astype(np.int32)}, "b has type int32"),
        (lambda a: {**a, "b": a["b"] > 0}, "b has type bool"),
        (lambda a: {**a, "b": a["b"].astype("U")}, "b has type <U"),
        (lambda a: {**a, "b": np.full(4, np.nan, np.float32)}, "b holds values that are not finite"),
        (lambda a: {**a, "b": np.full(4, -np.inf, np.float32)}, "b holds values that are not finite"),
        (lambda a: {**a, "b": np.full(4, 1e39)}, "b holds values that are not finite"),
    ],
)
def test_the_first_difference_is_named(arrays, change, said):
    """Which array, and in what it differs."""
    with pytest.raises(ProtocolError, match=said):
        check_like(change(arrays), arrays)


@pytest.mark.parametrize("place", [0, TILE - 1, TILE, 2 * TILE + 4])
@pytest.mark.parametrize(
    ("value", "said"),
    [(np.nan, "not finite"), (np.inf, "not finite"), (-np.inf, "not finite"), (-5.5, "beyond 5")],
)
def test_every_number_is_looked_at(place, value, said):
    """In whatever tile, and after a larger one."""
    array = np.full(2 * TILE + 5, 5.0, np.float32)
    check_like({"a": array}, {"a": array}, limit=5.0)
    array[place] = value

    with pytest.raises(ProtocolError, match=said):
        check_like({"a": array}, {"a": array}, limit=5.0)


def test_an_array_of_no_numbers_is_like_another():
    """Nothing in it is beyond anything."""
    check_like({"a": np.zeros((0, 3))}, {"a": np.zeros((0, 3))}, limit=1.0)


def test_no_value_is_told(arrays):
    """An error goes to another party; what an update holds does not."""
    arrays["b"][:] = [3.25, np.nan, 3.25, 3.25]

    with pytest.raises(ProtocolError) as caught:
        check_like(arrays, arrays)
    assert "3.25" not in str(caught.value) + caught.value.public


# --- to and from a model ---


def test_arrays_are_a_copy():
    """Training on leaves what was taken before as it was."""
    model = nn.Linear(2, 1)
    taken = arrays_of(model)
    before = taken["weight"].copy()
    with torch.no_grad():
        model.weight.add_(1)

    assert np.array_equal(taken["weight"], before)


def test_loading_gives_back_what_was_taken():
    """To the bit, and without a tie to the arrays."""
    one, other = nn.Linear(2, 1), nn.Linear(2, 1)
    taken = arrays_of(one)
    load_arrays(other, taken)
    taken["weight"][:] = 0

    assert torch.equal(other.weight, one.weight)
    assert torch.equal(other.bias, one.bias)
