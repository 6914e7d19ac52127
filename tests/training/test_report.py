"""What a converted checkpoint is judged by, and `nsa-fsa convert-report` as a user runs it."""

import json
import math
from functools import partial
from pathlib import Path

import matplotlib.image
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from nsa_fsa import patch_model, unpatch_model
from nsa_fsa.training import commands, measures, teach
from nsa_fsa.training.measures import Haystack, Haystacks
from tests.integrations.models import dense_model, scramble, tokens
from tests.training.command_line import forbid_loading, run_command, widen_console_and_hide_gpu

ROOT = Path(__file__).parents[2]
TEXT = ("--text", ROOT / "docs" / "spec.md", "--text", ROOT / "docs" / "lab")
LENGTH, WINDOWS = 256, 3


@pytest.fixture(autouse=True)
def on_a_wide_console_without_gpu(monkeypatch):
    widen_console_and_hide_gpu(monkeypatch)


def test_buckets_double_and_are_shorter_in_short_windows():
    assert measures.buckets(8192) == [
        *((0, 512), (512, 1024), (1024, 2048), (2048, 4096), (4096, 8192))
    ]
    assert measures.buckets(1024) == [(0, 128), (128, 256), (256, 512), (512, 1024)]
    assert measures.buckets(5000) == [*measures.buckets(4096), (4096, 5000)]
    assert measures.buckets(2) == [(0, 1), (1, 2)]


def test_the_loss_is_that_of_every_token():
    model, windows = dense_model(), tokens(3, 40)
    found = measures.losses(model, windows)
    logits = model(windows).logits[:, :-1]
    expected = cross_entropy(logits.transpose(1, 2), windows[:, 1:], reduction="none")
    torch.testing.assert_close(found, expected.detach(), rtol=1e-5, atol=1e-5)


def test_gaps_are_means_over_the_positions_of_a_bucket():
    generator = torch.Generator().manual_seed(0)
    dense, sparse = (torch.rand(5, 99, generator=generator) for _ in range(2))
    whole, first, *_, last = measures.gaps(dense, sparse)
    assert (whole.first, whole.stop, first.first, first.stop) == (0, 100, 0, 8)
    assert (last.first, last.stop) == (64, 100)
    for found, columns in ((whole, slice(None)), (first, slice(0, 7)), (last, slice(63, None))):
        assert found.dense == pytest.approx(dense[:, columns].mean().item())
        difference = (sparse - dense)[:, columns].mean(1)
        assert found.gap == pytest.approx(difference.mean().item(), abs=1e-6)
        assert found.uncertainty == pytest.approx(difference.std().item() / 5**0.5, rel=1e-4)
    assert math.isnan(measures.gaps(dense[:1], sparse[:1])[0].uncertainty)


def sparse_twin(**changes):
    model = dense_model(**changes)
    patch_model(model, "tiny", verbose=False)
    return scramble(model)


def test_layers_are_the_means_of_their_lessons():
    model, windows = sparse_twin(), tokens(2, 150)
    found = measures.layers(model, windows)
    for number, layer in enumerate(found):
        lessons = []
        for x in windows:
            with torch.no_grad(), teach(model) as teacher:
                model(x[None])
            lessons.append(teacher.lessons[number])
        assert layer.layer == number
        for name in ("error", "divergence", "mass", "recall"):
            mean = sum(getattr(x, name).item() for x in lessons) / 2
            assert getattr(layer, name) == pytest.approx(mean, rel=1e-5)
        assert layer.gates == pytest.approx(sum(x.gates for x in lessons).div(2).tolist())


def encode(text):
    return list(text.encode())


def test_a_needle_lies_at_its_depth_and_the_text_has_its_length():
    text = torch.tensor(encode((ROOT / "docs" / "spec.md").read_text()))
    haystacks = Haystacks((300, 600), depths=(0.0, 0.5, 1.0), samples=2)
    made = measures.hide(haystacks, text, encode)
    assert len(made) == haystacks.number == 12
    real = bytes(text.tolist()).decode()
    for x in made:
        length, depth = haystacks.lengths[x.place[0]], haystacks.depths[x.place[1]]
        assert len(x.ids) == length
        whole = bytes(x.ids.tolist()).decode(errors="replace")
        code = whole[-x.answer :]
        assert whole.count(code.strip()) == 2  # where it is hidden, and as the answer
        before, after = whole.split("\n\nRemember this: the secret code of the ")
        word = after.split(" is ")[0]
        needle = measures.NEEDLE.format(word=word, code=code.strip())
        question = measures.QUESTION.format(word=word)
        assert whole.endswith(question + code)
        room = length - len(needle) - len(question) - len(code)
        assert abs(len(before.encode()) - depth * room) < 3
        hay = whole.replace(needle, "").removesuffix(question + code)
        assert "\ufffd" in hay or hay in real
    again = measures.hide(haystacks, text, encode)
    assert all(torch.equal(x.ids, y.ids) for x, y in zip(made, again, strict=True))
    assert len({x.ids[-5:].numpy().tobytes() for x in made}) > 6
    for lengths in ((100,), (len(text) + 1,)):
        with pytest.raises(ValueError, match=r"with a needle needs .* Fix: lengths from"):
            measures.hide(Haystacks(lengths), text, encode)


def test_a_needle_is_found_where_a_model_would_write_it():
    model, prompt = dense_model(), tokens(1, 50)
    written = model.generate(prompt, max_new_tokens=4, do_sample=False)[0]
    assert measures.finds(model, Haystack((0, 0), written, 4))
    for place in range(-4, 0):
        other = written.clone()
        other[place] = other[place] % 90 + 1
        assert not measures.finds(model, Haystack((0, 0), other, 4))


def test_what_is_kept_is_a_share_of_what_dense_finds():
    haystacks = Haystacks((300, 600), depths=(0.0, 1.0), samples=1)
    made = [Haystack((row, column), torch.zeros(1), 1) for row in range(2) for column in range(2)]
    found = measures.needles(haystacks, made, [True, True, False, True], [True, False, True, True])
    assert found.dense == [[1, 1], [0, 1]]
    assert found.sparse == [[1, 0], [1, 1]]
    assert found.kept == pytest.approx(2 / 3)
    nothing = measures.needles(haystacks, made, [False] * 4, [True] * 4)
    assert math.isnan(nothing.kept)


def test_a_copy_is_what_stands_at_its_depth():
    window = torch.arange(1024)
    for depth, start in ((0.0, 0), (0.25, 224), (0.75, 672), (1.0, 896)):
        found = measures.with_copy(window, depth)
        assert torch.equal(found[:-64], window[:-64])
        assert torch.equal(found[-64:], window[start : start + 64])
    assert torch.equal(measures.with_copy(window[:64], 0.0)[-8:], window[:8])


def test_the_loss_of_a_copy_is_that_of_what_follows_its_cue():
    model, window = dense_model(), measures.with_copy(tokens(80), 0.5)
    (loss,) = measures.losses(model, [window])
    assert measures.copy_loss(model, window) == pytest.approx(loss[-8:].mean().item(), rel=1e-5)


def test_copies_are_means_over_windows():
    dense = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 9.0]
    found = measures.copies(dense, [x + 0.5 for x in dense])
    assert [x.depth for x in found] == [0.0, 0.25, 0.5, 0.75]
    assert [x.dense for x in found] == [2.0, 3.0, 4.0, 6.0]
    assert [x.gap for x in found] == [0.5] * 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A dense and a sparse checkpoint whose tokens are bytes, with the log of a conversion."""
    folder = tmp_path_factory.mktemp("report")
    dense_model(vocab_size=256).save_pretrained(folder / "dense")
    dense_model(vocab_size=256, seed=1).save_pretrained(folder / "twin")
    dense_model().save_pretrained(folder / "other")
    sparse_twin(vocab_size=256).save_pretrained(folder / "run" / "model")
    logs = [dict(step=1, loss=1.0, nsa_own=6.0, nsa_error=0.5, nsa_mass=0.8), dict(step=2, loss=5)]
    (folder / "run" / "history.json").write_text(json.dumps(logs))
    (folder / "run" / "conversion.json").write_text(json.dumps(dict(schedule=dict(warm_up=1))))
    return folder


SHORT = ("--length", LENGTH, "--windows", WINDOWS, "--needles", 1)


run = partial(run_command, "convert-report")


@pytest.fixture(scope="module")
def printed(folder):
    with pytest.MonkeyPatch.context() as patch:
        widen_console_and_hide_gpu(patch)
        return run(folder / "run" / "model", *TEXT, *SHORT, "--output", folder / "report")


def windows_of(count):
    """Evenly spaced windows of the text that the command was given."""
    names = [ROOT / "docs" / "spec.md", *sorted((ROOT / "docs" / "lab").rglob("*.md"))]
    text = torch.tensor([y for x in names for y in (*x.read_bytes(), 0)])
    number = len(text) // LENGTH
    return [text[i * number // count * LENGTH :][:LENGTH] for i in range(count)]


def test_the_document_has_what_was_measured_and_how(printed, folder):
    document = json.loads((folder / "report" / "report.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(folder / "run" / "model")
    windows = windows_of(WINDOWS)
    sparse = measures.losses(model, windows)
    layers = measures.layers(model, windows)
    copies = [measures.with_copy(windows[0], depth) for depth in measures.DEPTHS]
    sparse_copies = [measures.copy_loss(model, x) for x in copies]
    dense = measures.losses(unpatch_model(model), windows)
    expected = measures.copies([measures.copy_loss(model, x) for x in copies], sparse_copies)
    for found, copy in zip(document["copies"], expected, strict=True):
        assert found == pytest.approx(dict(copy._asdict(), gap=copy.gap), abs=1e-5)
    for found, expected in zip(document["loss"], measures.gaps(dense, sparse), strict=True):
        expected = expected._asdict() | dict(gap=expected.gap)
        assert found == pytest.approx(expected, abs=1e-5)
    for found, expected in zip(document["layers"], layers, strict=True):
        assert found["mass"] == pytest.approx(expected.mass, rel=1e-5)
        assert found["gates"] == pytest.approx(list(expected.gates), rel=1e-5)
    assert document["mass"] == pytest.approx(sum(x.mass for x in layers) / 2)
    assert document["curve"]["sparse"] == pytest.approx(sparse.mean(0).tolist(), rel=1e-4)
    assert document["needles"]["lengths"] == [256]
    assert document["needles"]["kept"] is None  # a random model finds none
    assert {"commit", "dirty", "source_digest"} <= document["code"].keys()
    assert {"gpu", "torch", "transformers", "python"} <= document["machine"].keys()
    assert document["date"].startswith("20")
    assert document["settings"]["block_size"] == 16
    assert f"Loss: {document['loss'][0]['sparse']:.4f} nats per token" in printed


def test_the_page_has_tables_and_pictures(printed, folder):
    output = folder / "report"
    page = (output / "report.md").read_text()
    document = json.loads((output / "report.json").read_text())
    last = document["loss"][-1]
    assert f"| 128 to 256 | {last['dense']:.4f} | {last['sparse']:.4f} | {last['gap']:+.4f}" in page
    assert "the same weights with dense attention" in page
    copy = document["copies"][1]
    assert f"| 25% | {copy['dense']:.4f} | {copy['sparse']:.4f} | {copy['gap']:+.4f} |" in page
    assert f"The report is in {output / 'report.md'}." in printed
    pictures = {"loss", "layers", "needles", "selections", "learning"}
    assert {x.stem for x in output.glob("*.png")} == pictures
    for name in pictures:
        assert f"]({name}.png)" in page
        picture = matplotlib.image.imread(output / f"{name}.png")
        assert picture.shape[0] > 300
        assert picture[..., :3].std() > 0.05


def test_another_dense_model_is_compared_with(folder):
    arguments = ("--dense", folder / "twin", "--length", LENGTH, "--windows", 1, "--needles", 0)
    run(folder / "run" / "model", *TEXT, *arguments, "--output", folder / "beside")
    document = json.loads((folder / "beside" / "report.json").read_text())
    twin = AutoModelForCausalLM.from_pretrained(folder / "twin")
    (loss,) = measures.losses(twin, windows_of(1))
    assert document["loss"][0]["dense"] == pytest.approx(loss.mean().item(), rel=1e-5)
    assert document["needles"] is None
    assert document["copies"] == []
    page = (folder / "beside" / "report.md").read_text()
    assert "## Needles" not in page
    assert "## Copies" not in page
    assert not (folder / "beside" / "needles.png").exists()


def test_a_report_is_kept_unless_it_is_to_go(printed, folder):
    arguments = (folder / "run" / "model", *TEXT, *SHORT, "--output", folder / "report")
    before = (folder / "report" / "report.json").read_text()
    assert "report.json is there already. Fix: another --output, or" in run(*arguments, code=2)
    assert (folder / "report" / "report.json").read_text() == before


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("dense", (), "dense is dense (llama). Fix: what `nsa-fsa convert`"),
        ("run/model", ("--dense", "run/model"), "run/model is sparse (nsa_llama). Fix: the dense"),
        ("run/model", ("--dense", "other"), "other has 97 tokens, and run/model 256. Fix"),
        ("run/model", ("--length", 1024), "length=1024 is more than the 512 positions"),
        ("run/model", ("--text", "no_file"), "no_file is not there"),
    ],
)
def test_what_cannot_be_measured_is_said_before_anything_is_loaded(
    folder, name, arguments, said, monkeypatch
):
    forbid_loading(monkeypatch)
    monkeypatch.chdir(folder)
    assert said in run(name, *TEXT, *arguments, "--output", folder / "refused", code=2)
    assert not (folder / "refused").exists()


def test_without_a_package_it_says_which(folder, monkeypatch):
    real = commands.importlib.util.find_spec

    def find(name):
        return None if name == "seaborn" else real(name)

    monkeypatch.setattr(commands.importlib.util, "find_spec", find)
    said = run(folder / "run" / "model", *TEXT, "--output", folder / "refused", code=2)
    assert "it needs seaborn, which is not installed. Fix: pip install" in said
