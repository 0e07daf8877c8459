"""Text as a probe: through the model's own tokenizer, as bytes, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sources.rig import BUILD, SIZES

import jacdiag
from jacdiag.comparison.probe_facts import facts_of, probe_options, spoken
from jacdiag.errors import ProbeError, UsageError
from jacdiag.records import ProbeRecord
from jacdiag.sources import Source, build_probe, load
from jacdiag.sources.text_probe import has_tokenizer

STORY = "the cat sat on the mat and the dog ran to the cat " * 40
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(set(STORY.split()))]


def save_words(folder: Path, words: list[str] = WORDS) -> None:
    """A tokenizer.json with a word a token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(
        models.WordLevel({word: k for k, word in enumerate(words)}, unk_token="[UNK]")
    )
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]").save_pretrained(folder)


def save_gpt2(folder: Path, vocabulary: int = 300) -> Path:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {
        "n_layer": 2,
        "n_embd": 16,
        "n_head": 2,
        "n_positions": 64,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, **sizes)).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a model and its tokenizer."""
    path = save_gpt2(tmp_path / "model")
    save_words(path)
    return path


@pytest.fixture
def story(tmp_path: Path) -> str:
    path = tmp_path / "story.txt"
    path.write_text(STORY, encoding="utf-8")
    return str(path)


def words_of(probe: Any) -> str:
    return " ".join(WORDS[k] for k in probe.token_ids.flatten().tolist())


def test_text_goes_through_the_tokenizer_of_the_folder(folder: Path, story: str) -> None:
    probe = build_probe(load(str(folder)), tokens=story, seq=8)
    assert words_of(probe) == " ".join(STORY.split()[:16])
    assert probe.record.tokens.startswith("story.txt through ") and probe.record.tokens.endswith(
        " of model"
    )
    assert not probe.record.is_random and probe.notes == []


@pytest.mark.parametrize("files", ["vocab.txt", "merges", "byt5"])
def test_every_kind_of_tokenizer_file(tmp_path: Path, story: str, files: str) -> None:
    path = save_gpt2(tmp_path / "model", vocabulary=400)
    if files == "vocab.txt":
        (path / "vocab.txt").write_text("\n".join(WORDS))
        (path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    elif files == "merges":
        letters = sorted(set(STORY.replace(" ", "Ġ")))
        entries = {token: k for k, token in enumerate([*letters, "th", "the", "<|endoftext|>"])}
        (path / "vocab.json").write_text(json.dumps(entries))
        (path / "merges.txt").write_text("#version: 0.2\nt h\nth e\n")
    else:
        (path / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    probe = build_probe(load(str(path)), tokens=story, seq=8)
    assert probe.token_ids is not None and probe.token_ids.shape == (2, 8)
    expected = {
        "vocab.txt": WORDS.index("the"),
        "merges": entries["the"] if files == "merges" else 0,
        "byt5": ord("t") + 3,
    }[files]
    assert int(probe.token_ids[0, 0]) == expected
    assert "Tokenizer of model" in probe.record.tokens


def test_a_config_alone_is_no_tokenizer(tmp_path: Path, story: str) -> None:
    path = save_gpt2(tmp_path / "model")
    assert not has_tokenizer(path)
    with pytest.raises(
        ProbeError, match="no tokenizer for this model is known\na vocabulary of 300"
    ):
        build_probe(load(str(path)), tokens=story)


def test_a_tokenizer_next_to_a_weights_file(folder: Path, story: str, tmp_path: Path) -> None:
    source = Source.of_module(load(str(folder)).model)  # type: ignore[arg-type]
    source.info = {"path": str(folder / "model.safetensors"), "format": "safetensors"}
    assert "of model" in build_probe(source, tokens=story, seq=8).record.tokens
    source.info = {"path": str(tmp_path / "elsewhere.safetensors")}
    with pytest.raises(ProbeError, match="no tokenizer"):
        build_probe(source, tokens=story, seq=8)


def test_a_module_from_a_folder_knows_its_tokenizer(folder: Path, story: str) -> None:
    from transformers import AutoModelForCausalLM

    module = AutoModelForCausalLM.from_pretrained(folder)
    assert "of model" in build_probe(Source.of_module(module), tokens=story, seq=8).record.tokens


def test_a_tokenizer_with_more_tokens_than_the_model(tmp_path: Path, story: str) -> None:
    path = save_gpt2(tmp_path / "model", vocabulary=6)
    save_words(path)
    with pytest.raises(
        ProbeError, match=r"out of the vocabulary\nid \d+ at position 0 .*knows 0 to 5"
    ):
        build_probe(load(str(path)), tokens=story, seq=8)


def test_a_tokenizer_that_cannot_be_loaded_is_an_error_and_not_random_tokens(
    folder: Path, story: str
) -> None:
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ProbeError, match="cannot load the tokenizer"):
        build_probe(load(str(folder)), tokens=story)
    assert build_probe(load(str(folder))).record.tokens == "random"  # nobody asked for text


def test_a_tokenizer_with_code_of_its_own_is_not_run_unasked(tmp_path: Path, story: str) -> None:
    path, ran = save_gpt2(tmp_path / "model"), tmp_path / "ran"
    (path / "tokenizer_config.json").write_text(
        '{"auto_map": {"AutoTokenizer": ["mine.Mine", null]}}'
    )
    (path / "mine.py").write_text(
        "from transformers import ByT5Tokenizer\n"
        f"open({str(ran)!r}, 'w').close()\n"
        "class Mine(ByT5Tokenizer):\n    pass\n"
    )
    with pytest.raises(ProbeError, match="--trust-pickle lets it run"):
        build_probe(load(str(path)), tokens=story)
    assert not ran.exists()
    assert (
        "Mine of model"
        in build_probe(load(str(path)), tokens=story, trust_code=True, seq=8).record.tokens
    )
    assert ran.exists()


def test_unknown_tokens_are_said_and_a_foreign_text_is_refused(
    folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "t.txt"
    path.write_text("the cat sat on the zebra and the cat ran " * 10)
    probe = build_probe(load(str(folder)), tokens=str(path), seq=9)
    assert probe.notes == ["11.1% of the probe's tokens are unknown to the tokenizer ([UNK])"]
    path.write_text("zebra " * 200)
    with pytest.raises(ProbeError, match=r"does not know the text .*\n100% of the first 18"):
        build_probe(load(str(folder)), tokens=str(path), seq=9)


def test_text_shorter_than_a_sequence_is_refused_with_a_length(
    folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "t.txt"
    path.write_text("the cat sat")
    with pytest.raises(ProbeError, match="too few tokens\n3, a sequence takes 64\n--seq 3"):
        build_probe(load(str(folder)), tokens=str(path))
    probe = build_probe(load(str(folder)), tokens=str(path), seq=3)
    assert probe.record.batch == 1 and probe.notes == [
        "'t.txt' has 3 tokens: they fill 1 of 2 sequences"
    ]
    path.write_text(" \n ")
    with pytest.raises(ProbeError, match="too few tokens"):
        build_probe(load(str(folder)), tokens=str(path))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_byte_order_marks_are_no_text(folder: Path, tmp_path: Path, encoding: str) -> None:
    (tmp_path / "t.txt").write_text(STORY, encoding=encoding)
    probe = build_probe(load(str(folder)), tokens=str(tmp_path / "t.txt"), seq=8)
    assert words_of(probe).startswith("the cat sat")
    as_bytes = build_probe(
        load(BUILD, model_args={**SIZES, "vocab_size": 256}), tokens=str(tmp_path / "t.txt")
    )
    assert (
        as_bytes.token_ids is not None
        and bytes(as_bytes.token_ids[0].tolist()) == STORY[:32].encode()
    )


def test_text_in_another_encoding_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_bytes("thé cat".encode("latin1") * 100)
    with pytest.raises(
        ProbeError, match="is no UTF-8 text\nbyte 0xe9 at position 2\nfor example: iconv"
    ):
        build_probe(load(str(folder)), tokens=str(tmp_path / "t.txt"))


def test_a_character_cut_at_the_largest_size_is_left_out(folder: Path, tmp_path: Path) -> None:
    from jacdiag.sources import text_probe as text

    (tmp_path / "t.txt").write_bytes(b"a" + "é".encode() * (text._LARGEST // 2))
    assert text.read_text(tmp_path / "t.txt")[:3] == "aéé"


def test_json_lines_text_is_read_as_a_probe(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in [STORY, "the mat"]))
    assert words_of(build_probe(load(str(folder)), tokens=str(path), seq=4)).startswith(
        "the cat sat on"
    )
    path.write_text('{"text": "the"}\n{"content": "cat"}\n')
    with pytest.raises(ProbeError, match="a line without text\nline 2"):
        build_probe(load(str(folder)), tokens=str(path), seq=4)
    path.write_text("the cat\n")
    with pytest.raises(ProbeError, match="line 1: JSONDecodeError"):
        build_probe(load(str(folder)), tokens=str(path), seq=4)


@pytest.mark.parametrize(("vocabulary", "notes"), [(256, 0), (260, 1), (264, 1)])
def test_bytes_are_ids_for_a_vocabulary_of_bytes(story: str, vocabulary: int, notes: int) -> None:
    probe = build_probe(load(BUILD, model_args={**SIZES, "vocab_size": vocabulary}), tokens=story)
    assert probe.token_ids is not None and bytes(probe.token_ids[0].tolist()) == STORY[:32].encode()
    assert probe.record.tokens == "story.txt" and len(probe.notes) == notes


@pytest.mark.parametrize("vocabulary", [65, 255, 265, 50257])
def test_bytes_are_no_ids_for_other_vocabularies(story: str, vocabulary: int) -> None:
    with pytest.raises(ProbeError, match="no tokenizer for this model") as refused:
        build_probe(load(BUILD, model_args={**SIZES, "vocab_size": vocabulary}), tokens=story)
    assert ".npy or .bin" in str(refused.value)


def test_a_byte_model_next_to_a_tokenizer_of_another_model(tmp_path: Path, story: str) -> None:
    save_words(tmp_path, [*WORDS, *(f"w{k}" for k in range(300))])
    source = load(BUILD, model_args={**SIZES, "vocab_size": 256})
    source.info = {"path": story, "format": "nanogpt"}
    assert build_probe(source, tokens=story).record.tokens == "story.txt"


def test_a_slow_tokenizer_is_given_no_more_than_it_needs(
    folder: Path, story: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoTokenizer

    Path(story).write_text(STORY * 500)
    inner, longest = AutoTokenizer.from_pretrained(folder), []

    class Counting:
        unk_token_id, unk_token = inner.unk_token_id, inner.unk_token

        def __call__(self, text: str, **how: Any) -> Any:
            longest.append(len(text))
            return inner(text, **how)

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *args, **how: Counting())
    build_probe(load(str(folder)), tokens=story, seq=8)
    assert max(longest) < 10_000


def test_a_probe_that_is_given_twice(folder: Path, story: str) -> None:
    source = load(str(folder))
    with pytest.raises(UsageError, match="the probe is given twice"):
        build_probe(source, tokens=story, inputs="x.py:f")
    with pytest.raises(UsageError, match=r"--tokens .* and inputs that were passed"):
        jacdiag.audit(source, torch.zeros(1, 4).long(), tokens=story)
    with pytest.raises(UsageError, match=r"--inputs x.py:f and inputs that were passed"):
        jacdiag.audit(source, torch.zeros(1, 4).long(), input_factory="x.py:f")


def test_the_report_names_tokenizer_and_file(folder: Path, story: str) -> None:
    report = jacdiag.audit(str(folder), tokens=story, seq=8, state="trained")
    probe = json.loads(report.to_json())["probe"]
    assert probe["tokens"].startswith("story.txt through ") and not probe["off_distribution"]
    (folder / "tokenizer.json").unlink()
    drawn = jacdiag.audit(str(folder), seq=8, state="trained")
    assert drawn.probe is not None and drawn.probe.off_distribution


def test_random_pixels_are_off_distribution_too() -> None:
    assert ProbeRecord(1, None, 0, tokens="random pixels").is_random
    assert not ProbeRecord(1, 8, 0, tokens="random.txt").is_random


def test_the_option_that_gives_the_same_probe_again() -> None:
    facts = facts_of(ProbeRecord(2, 8, 0, tokens="t.txt through GPT2Tokenizer of gpt2"), "float32")
    assert probe_options(facts, ["tokens", "seq"]) == "--tokens t.txt --seq 8"
    assert spoken(facts) == "2 x 8 tokens of t.txt through GPT2Tokenizer of gpt2, float32"
    own = facts_of(ProbeRecord(2, 8, 0, tokens="text through its own tokenizer"), "float32")
    assert probe_options(own, ["tokens"]) == "without --tokens and --inputs"


def test_tokens_are_not_read_where_no_model_is_run(tmp_path: Path) -> None:
    torch.save({"layers.0.mlp.w1.weight": torch.randn(8, 8)}, tmp_path / "w.pt")
    np.save(tmp_path / "t.npy", np.arange(9))
    report = jacdiag.audit(str(tmp_path / "w.pt"), tokens=str(tmp_path / "t.npy"))
    assert any("was not read: no model was run" in note for note in report.notes)
