"""Generation equals running the reference token by token; prompts, stopping, limits, every kind of engine."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_export.errors import BundleError, InputError
from moe_export.runtime.session import Session, load
from tests.helpers import tiny_model as tiny_model
from tests.helpers.tiny_bundle import TinyReference, make_tiny_bundle


def _reference_greedy(prompt: list[int], count: int) -> list[int]:
    ids, reference = list(prompt), TinyReference()
    for _ in range(count):
        ids.append(int(reference.run({"input_ids": np.array([ids])}).outputs["logits"][0, -1].argmax()))
    return ids[len(prompt) :]


def test_greedy_equals_the_reference(tiny: Session) -> None:
    result = tiny.generate("hello", max_new_tokens=25)
    assert result.token_ids == [_reference_greedy(list(b"hello"), 25)]
    assert result.finish_reasons == ["length"]
    assert (result.prompt_tokens, result.new_tokens) == (5, 25)
    assert result.prefill_seconds > 0 and result.decode_seconds > 0
    assert result.texts == [tiny.tokenizer.decode(result.token_ids[0])]  # type: ignore[union-attr]


def test_a_stepper_gives_the_logits_of_a_run(tiny: Session, tmp_path: Path) -> None:
    ids, one = np.array([list(b"hello")]), np.ones((1, 5), np.int64)
    want = tiny.run({"input_ids": ids})["logits"]
    with load(make_tiny_bundle(tmp_path / "b", cache=False), threads=1) as uncached:
        for session in (tiny, uncached):
            stepper = session.stepper()
            cuts = ((0, 3), (3, 4), (4, 5))
            pieces = [stepper.feed(ids[:, a:b], one[:, a:b])["logits"].copy() for a, b in cuts]
            np.testing.assert_allclose(np.concatenate(pieces, axis=1), want, atol=2e-5)
    with pytest.raises(InputError, match="batch of 9"):
        tiny.stepper(9)


def test_left_padding_does_not_change_a_sequence(tiny: Session) -> None:
    prompts = ["x", "hello", "a longer prompt"]
    alone = [tiny.generate(prompt, max_new_tokens=12).token_ids[0] for prompt in prompts]
    assert tiny.generate(prompts, max_new_tokens=12).token_ids == alone
    assert len({tuple(ids) for ids in alone}) == 3


def test_prompts_of_every_kind_are_the_same(tiny: Session) -> None:
    want = tiny.generate("hi", max_new_tokens=5).token_ids
    ids = list(b"hi")
    for prompt in (ids, tuple(ids), np.array(ids), [ids], np.array([ids], np.int32), ["hi"], [np.array(ids)]):
        assert tiny.generate(prompt, max_new_tokens=5).token_ids == want
    two = tiny.generate([ids, [65]], max_new_tokens=5)
    assert two.token_ids[0] == want[0] and two.prompt_tokens == 3


def test_an_empty_prompt_starts_with_bos(tiny: Session) -> None:
    want = tiny.generate([tiny_model.BOS], max_new_tokens=4).token_ids
    assert tiny.generate("", max_new_tokens=4).token_ids == want


def test_stream_gives_the_same_tokens_and_text(tiny: Session) -> None:
    options: dict[str, Any] = {"max_new_tokens": 15, "temperature": 0.8, "top_k": 40, "top_p": 0.9, "seed": 5}
    whole = tiny.generate(["one", "other"], **options)
    events = list(tiny.stream(["one", "other"], **options))
    for sequence in range(2):
        own = [e for e in events if e.sequence == sequence]
        assert [e.token_id for e in own] == whole.token_ids[sequence]
        assert "".join(e.text for e in own) == whole.texts[sequence]  # type: ignore[index]
        assert [e.finish_reason for e in own] == [None] * 14 + ["length"]


def test_seed_repeats_and_matters(tiny: Session) -> None:
    runs = [tiny.generate("a", max_new_tokens=12, temperature=1.0, seed=s).token_ids for s in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]
    free = [tiny.generate("a", max_new_tokens=12, temperature=1.0).token_ids for _ in range(2)]
    assert free[0] != free[1]


def test_stop_token_and_eos_end_one_sequence_not_the_batch(tiny: Session, tmp_path: Path) -> None:
    plain = tiny.generate(["hello", "x"], max_new_tokens=12)
    stop = plain.token_ids[0][4]
    first = plain.token_ids[0].index(stop)
    assert stop not in plain.token_ids[1]
    stopped = tiny.generate(["hello", "x"], max_new_tokens=12, stop=[stop])
    assert stopped.token_ids == [plain.token_ids[0][: first + 1], plain.token_ids[1]]
    assert stopped.finish_reasons == ["stop", "length"]
    assert stopped.new_tokens == first + 1 + 12
    assert stopped.texts[0] == tiny.tokenizer.decode(plain.token_ids[0][:first])  # type: ignore[index,union-attr]

    bundle = make_tiny_bundle(tmp_path / "b")
    data = json.loads((bundle / "manifest.json").read_text())
    data["text"]["eos_token_ids"] = [stop]
    (bundle / "manifest.json").write_text(json.dumps(data))
    with load(bundle, threads=1) as session:
        ended = session.generate(["hello", "x"], max_new_tokens=12)
    assert ended.token_ids == stopped.token_ids
    assert ended.finish_reasons == ["eos", "length"]


def test_stop_string_over_two_tokens(tiny: Session) -> None:
    plain = tiny.generate("hello", max_new_tokens=20)
    text = plain.texts[0]  # type: ignore[index]
    place = next(
        i for i in range(2, len(text) - 1) if text[i : i + 2].isascii() and text.index(text[i : i + 2]) == i
    )
    stop = text[place : place + 2]
    for given in ([stop], stop):
        result = tiny.generate("hello", max_new_tokens=20, stop=given)
        assert result.texts == [text[:place]] and result.finish_reasons == ["stop"]
        assert result.new_tokens < 20
    pieces = [e.text for e in tiny.stream("hello", max_new_tokens=20, stop=[stop])]
    assert "".join(pieces) == text[:place]


def test_the_bundle_limit_ends_generation_visibly(tiny: Session) -> None:
    result = tiny.generate([list(range(60))], max_new_tokens=20)
    assert (result.new_tokens, result.finish_reasons) == (4, ["limit"])
    assert tiny.generate([list(range(60))], max_new_tokens=4).finish_reasons == ["length"]
    with pytest.raises(InputError, match="prompt has 64 tokens; the bundle's maximum is 64"):
        tiny.generate([list(range(64))])


@pytest.mark.parametrize(
    ("prompt", "options", "text"),
    [
        (None, {}, "prompt is a NoneType"),
        (5, {}, "prompt is a int"),
        (b"abc", {}, "prompt is a bytes"),
        ([], {}, "prompt is an empty list"),
        (["a", 1], {}, "mixes text, token ids and lists"),
        ([[1], 1], {}, "mixes text, token ids and lists"),
        (["a", [1]], {}, "mixes text, token ids and lists"),
        ([1.5], {}, "contains 1.5"),
        ([True], {}, "contains True"),
        ([[1], [2, 300]], {}, r"prompt 1\[1\] is 300; the vocabulary is 0 to 258"),
        ([-1], {}, r"prompt 0\[0\] is -1"),
        (["a"] * 9, {}, "batch of 9 is beyond the bundle's maximum 8"),
        ("a", {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ("a", {"max_new_tokens": 2.0}, "max_new_tokens is 2.0"),
        ("a", {"stop": [""]}, "stop contains ''"),
        ("a", {"stop": [None]}, "stop contains None"),
        ("a", {"stop": [259]}, r"stop\[0\] is 259"),
        ("a", {"temperature": -1}, "temperature is -1"),
        ("a", {"top_k": 3}, "top_k has no effect"),
    ],
)
@pytest.mark.parametrize("call", ["generate", "stream"])
def test_wrong_requests(tiny: Session, call: str, prompt: Any, options: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        getattr(tiny, call)(prompt, **options)


def test_without_a_tokenizer_ids_work_and_text_is_refused(tmp_path: Path, tiny: Session) -> None:
    with load(make_tiny_bundle(tmp_path / "b", tokenizer=False), threads=1) as session:
        result = session.generate(list(b"hello"), max_new_tokens=5)
        assert result.texts is None
        assert result.token_ids == tiny.generate("hello", max_new_tokens=5).token_ids
        assert [e.text for e in session.stream(list(b"hello"), max_new_tokens=2)] == ["", ""]
        with pytest.raises(InputError, match="no tokenizer; give token ids"):
            session.generate("hello")
        with pytest.raises(InputError, match="stop string 'x' needs a tokenizer"):
            session.generate([1], stop=["x"])


def test_an_empty_prompt_without_bos_is_refused(tmp_path: Path) -> None:
    bundle = make_tiny_bundle(tmp_path / "b")
    data = json.loads((bundle / "manifest.json").read_text())
    data["text"]["bos_token_id"] = None
    (bundle / "manifest.json").write_text(json.dumps(data))
    with load(bundle, threads=1) as session, pytest.raises(InputError, match="prompt 1 is empty"):
        session.generate(["a", ""])


def test_an_engine_without_cache_gives_the_same_and_says_so(tmp_path: Path, tiny: Session) -> None:
    with load(make_tiny_bundle(tmp_path / "b", cache=False), threads=1) as session:
        assert session.notes == ("no KV cache: generation runs the whole sequence again for every new token",)
        prompts = ["hello", "another"]
        want = tiny.generate(prompts, max_new_tokens=10)
        got = session.generate(prompts, max_new_tokens=10)
        assert (got.token_ids, got.texts) == (want.token_ids, want.texts)
        with pytest.raises(InputError, match="no KV cache"):
            session.chunked_logits([[1, 2]], [[1, 1]], [1, 1])
        assert session.generate([list(range(60))], max_new_tokens=20).finish_reasons == ["limit"]


def test_nan_logits_end_generation_with_an_error(tmp_path: Path) -> None:
    from tests.helpers.tiny_bundle import TinyWeights, build_tiny_model

    bundle = make_tiny_bundle(tmp_path / "b")
    weights = TinyWeights.make()
    weights = dataclasses.replace(weights, final_norm=np.full_like(weights.final_norm, np.nan))
    (bundle / "model.onnx").write_bytes(build_tiny_model(weights).SerializeToString())
    data = json.loads((bundle / "manifest.json").read_text())
    for entry in data["files"]:
        entry["size"] = (bundle / entry["path"]).stat().st_size
    (bundle / "manifest.json").write_text(json.dumps(data))
    with load(bundle, trust=True, threads=1) as session, pytest.raises(BundleError, match="logit nan"):
        session.generate("hello")


def test_a_long_generation_grows_its_buffers(tmp_path: Path) -> None:
    with load(make_tiny_bundle(tmp_path / "b", max_sequence=None), threads=1) as session:
        ids = session.generate(["ab", "abcdef"], max_new_tokens=150).token_ids
        whole = [list(b"ab") + ids[0], list(b"abcdef") + ids[1]]
        for row, start in zip(whole, (2, 6), strict=True):
            logits = session.run({"input_ids": [row[:-1]]})["logits"][0]
            assert logits[start - 1 :].argmax(-1).tolist() == row[start:]
