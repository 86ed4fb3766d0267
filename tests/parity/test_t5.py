"""Golden text features, position buckets and full-size parameter names of the umT5 encoder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor, nn

from parity.golden import Case, assert_close, load_case, load_json
from wanvram.models.t5 import Attention, T5Encoder, position_buckets
from wanvram.specs import T5, T5Spec

CASE = load_case("t5_encoder")
CALLS = {call["name"]: call for call in CASE.calls()}
MAX_DISTANCE = 128  # not part of the official constructor's arguments


def _spec(case: Case) -> T5Spec:
    c = case.config
    return T5Spec(
        vocab_size=c["vocab_size"],
        dim=c["dim"],
        dim_attn=c["dim_attn"],
        dim_ffn=c["dim_ffn"],
        num_heads=c["num_heads"],
        num_layers=c["encoder_layers"],
        num_buckets=c["num_buckets"],
        max_distance=MAX_DISTANCE,
    )


@pytest.fixture(scope="module")
def encoder() -> T5Encoder:
    model = T5Encoder(_spec(CASE), torch.float32)
    model.load_state_dict(CASE.weights(), strict=True)
    return model.requires_grad_(False)


def _encode(encoder: T5Encoder, ids: Tensor) -> Tensor:
    return encoder(encoder.token_embedding(ids))


@pytest.mark.parametrize("name", CALLS)
def test_valid_rows_are_official_without_computing_the_padding(encoder: T5Encoder, name: str) -> None:
    for row, length in enumerate(CALLS[name]["valid_lens"]):
        if CALLS[name]["mask"]:
            mask = CASE[f"input.{name}.mask"][row]
            assert mask[:length].all()
            assert not mask[length:].any()
        features = _encode(encoder, CASE[f"input.{name}.ids"][row, :length])
        assert_close(features, CASE[f"output.{name}"][row, :length], f"{name} row {row}")


def test_buckets_are_official_for_every_distance() -> None:
    buckets = position_buckets(CASE["input.rel_pos"], CASE.config["num_buckets"], MAX_DISTANCE)
    assert_close(buckets, CASE["output.rel_bucket"], "rel_bucket")


def test_the_position_bias_is_official(encoder: T5Encoder) -> None:
    for name in (n for n in CASE.tensors if n.startswith("mid.pos_bias_")):
        golden = CASE[name][0]
        positions = torch.arange(golden.shape[-1])
        buckets = position_buckets(positions[None, :] - positions[:, None], CASE.config["num_buckets"], MAX_DISTANCE)
        block = encoder.blocks[int(name.rsplit("block", 1)[1])]
        assert_close(block.pos_embedding(buckets), golden, name)


def test_full_size_keys_and_shapes_are_those_of_the_checkpoint() -> None:
    with torch.device("meta"):
        model = T5Encoder(T5["umt5-xxl"], torch.bfloat16)
    expected = load_json("full_size_keys")["umt5-xxl-encoder"]["keys"]
    assert {key: list(t.shape) for key, t in model.state_dict().items()} == expected
    assert {t.dtype for t in model.state_dict().values()} == {torch.bfloat16}


def test_all_blocks_are_handed_to_walk_once(encoder: T5Encoder) -> None:
    walked: list[nn.Module] = []

    def walk(blocks: Sequence[nn.Module]) -> Iterator[nn.Module]:
        for block in blocks:
            walked.append(block)
            yield block

    embedded = encoder.token_embedding(torch.tensor([3, 4, 1]))
    assert torch.equal(encoder(embedded, walk=walk), encoder(embedded))
    assert walked == encoder.walk_order() == list(encoder.blocks)


def test_the_embedded_prompt_is_left_unchanged(encoder: T5Encoder) -> None:
    embedded = encoder.token_embedding(torch.tensor([5, 6, 7, 1]))
    before = embedded.clone()
    encoder(embedded)
    assert torch.equal(embedded, before)


def test_a_bfloat16_softmax_rounds_the_float32_one() -> None:
    scores = (8 * torch.randn(4, 64, 64, generator=torch.Generator().manual_seed(1))).bfloat16()
    assert torch.equal(torch.softmax(scores, -1), torch.softmax(scores.float(), -1).bfloat16())


def test_bfloat16_features_stay_close_to_float32() -> None:
    reference = T5Encoder(_spec(CASE), torch.float32).requires_grad_(False)
    reference.load_state_dict(CASE.weights())
    model = T5Encoder(_spec(CASE), torch.bfloat16).requires_grad_(False)
    model.load_state_dict(CASE.weights())
    ids = torch.arange(3, 23)
    low, full = _encode(model, ids), _encode(reference, ids)
    assert low.dtype == torch.bfloat16
    assert (low.float() - full).abs().max() < 0.05 * full.abs().max()


def test_attention_of_one_token_is_its_value() -> None:
    attention = Attention(T5["tiny"], torch.float32).requires_grad_(False)
    x = torch.randn(1, T5["tiny"].dim, generator=torch.Generator().manual_seed(1))
    result = attention(x, torch.zeros(T5["tiny"].num_heads, 1, 1))
    torch.testing.assert_close(result, attention.o(attention.v(x)))


def test_texts_encoded_together_give_what_each_gives_alone_in_one_pass(encoder: T5Encoder) -> None:
    name = next(name for name in CALLS if CASE[f"input.{name}.ids"].shape[0] > 1)
    ids = CASE[f"input.{name}.ids"]
    rows = [encoder.token_embedding(row[:length]) for row, length in zip(ids, (7, 12), strict=False)]
    passes = []

    def walk(blocks: Sequence[nn.Module]) -> Iterator[nn.Module]:
        passes.append(len(blocks))
        yield from blocks

    together = encoder.encode(rows, walk=walk)
    assert passes == [len(encoder.blocks)]
    assert len(together) == 2
    for text, alone in zip(together, [encoder(r) for r in rows], strict=True):
        assert torch.equal(text, alone)
