"""The page about a fit: its numbers, its pictures, and that names of others do no harm to it."""

from __future__ import annotations

import base64
import io
import re
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from bridge.errors import InputError
from bridge.reporting.page import write_report
from bridge.reporting.result import FitResult, FitStep
from bridge.simulator.space import Parameter, ParameterSpace

pytest.importorskip("matplotlib", reason="matplotlib is optional (extra `report`)")
EVIL = "<script>alert('$1')</script> & \"$\\frac\" 名 \x1b[2J"


def make(target, names=("a", "b"), **changes):
    d = len(names)
    space = ParameterSpace(tuple(Parameter(n, "um", -5.0, 5.0) for n in names))
    history = tuple(
        FitStep(i, 10.0 ** (1 - i), 1.0, tuple(1.0 + k / (i + 1) for k in range(d)), 64 * (i + 1), (0.1,) * d)
        for i in range(5)
    )
    target = np.asarray(target, dtype=float)
    fields = {
        "space": space,
        "parameters": np.arange(1.0, d + 1),
        "start": np.zeros(d),
        "standard_error": np.full(d, 0.02),
        "loss": 1e-3,
        "stop_reason": "converged",
        "history": history,
        "num_evaluations": 1234,
        "wall_s": 200.0,
        "output": target + 0.5,
        "start_output": target - 1.0,
    } | changes
    return FitResult(**fields)


class Page(HTMLParser):
    """What a browser would see: elements, the text, the rows of tables; unclosed elements are an error."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.text, self.rows, self.images = [], [], "", [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag == "img":
            self.images.append(dict(attrs))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def page(result, target, tmp_path, **settings):
    path = write_report(result, np.asarray(target, dtype=float), tmp_path / "report.html", **settings)
    text = path.read_text(encoding="utf-8")
    # Nothing from elsewhere: every link stays inside the page, and the browser is told so.
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", text)
    assert "default-src 'none'" in text
    assert "<script" not in text
    return Page(text)


def pixels(image):
    from matplotlib.image import imread

    head, data = image["src"].split(",")
    assert head == "data:image/png;base64"
    return imread(io.BytesIO(base64.b64decode(data)))


def test_numbers_and_words(tmp_path):
    covariance = 4e-4 * np.array([[1.0, -0.98], [-0.98, 1.0]])
    result = make(
        [1.0, 2.0],
        covariance=covariance,
        warnings=("b acts like a",),
        num_failed=7,
        num_reused=30,
        num_cached=1000,
        num_surrogate=50,
        parameters=np.array([1.0, 5.0]),
        method="gauss-newton",
    )
    seen = page(result, [1.0, 2.0], tmp_path, title="My fit", settings={"seed": 3}, command="python -m bridge fit a b")
    assert (
        "The fit converged after 5 steps and 1,234 simulations (7 failed; 1,000 found in the store, 234 carried out; "
        "30 of earlier runs used again; 50 of the surrogate besides), in 3 min 20 s." in seen.text
    )
    assert "The loss went from 10 to 0.001." in seen.text
    assert "b acts like a" in seen.text
    close = "hard to tell from {} (correlation -0.980)"
    assert ["a", "1.000", "0.020", "um", "0", "-5 to 5", close.format("b")] in seen.rows
    bound = "at its bound: the optimum may lie beyond; "
    assert ["b", "5.000", "0.020", "um", "0", "-5 to 5", bound + close.format("a")] in seen.rows
    assert ["a", "+1.00", "-0.98"] in seen.rows
    assert ["1", "2", "1", "2.5"] in seen.rows  # few numbers are a table: index, target, start, fit
    assert ["seed", "3"] in seen.rows
    assert ["method", "gauss-newton"] in seen.rows
    assert ["numpy", np.__version__] in seen.rows
    assert "python -m bridge fit a b" in seen.text
    assert seen.tags.count("svg") == 1


def test_an_image_its_start_fit_and_residual(tmp_path):
    target = np.zeros((20, 30))
    target[5:10, 5:20] = 1.0
    output = target.copy()
    output[5, 5] = 0.0  # the residual is one pixel
    seen = page(make(target, output=output, start_output=0 * target), target, tmp_path)
    assert [i["alt"] for i in seen.images] == ["target", "start", "fit", "residual"]
    drawn = [pixels(i) for i in seen.images]
    assert all(d.shape[:2] == (20, 30) for d in drawn)
    np.testing.assert_array_equal(drawn[0][..., 0], target)
    np.testing.assert_array_equal(drawn[1][..., 0], 0)
    red = drawn[3][..., 0] - drawn[3][..., 2]
    assert np.argmax(red) == 5 * 30 + 5
    assert (np.delete(red.ravel(), 155) == red[0, 0]).all()
    assert "blurred" not in seen.text


def test_noise_is_blurred_and_said_to_be(tmp_path):
    rng = np.random.default_rng(0)
    image = np.zeros((64, 64))
    image[20:40, 20:40] = 1.0
    target = image + 5 * rng.standard_normal(image.shape)
    seen = page(make(target, output=image, start_output=image), target, tmp_path)
    assert seen.text.count("blurred by 1.5 pixels") == 3
    assert pixels(seen.images[0])[..., 0].std() < 0.4


@pytest.mark.parametrize(
    ("shape", "images", "charts"),
    [
        ((), 0, 1),
        ((3, 4), 0, 1),
        ((100,), 0, 2),
        ((3, 50), 0, 2),
        ((7, 16, 16), 16, 1),
        ((16, 17, 3), 4, 1),
        ((2, 3, 16, 16), 16, 1),
        ((1300, 640), 4, 1),
    ],
)
def test_outputs_of_any_shape(tmp_path, shape, images, charts):
    target = np.linspace(0, 1, int(np.prod(shape))).reshape(shape)
    seen = page(make(target), target, tmp_path)
    assert (len(seen.images), seen.tags.count("svg")) == (images, charts)
    if shape == (7, 16, 16):
        assert re.findall(r"Slice \d of 7", seen.text) == [f"Slice {k} of 7" for k in (1, 3, 5, 7)]
    if shape == (1300, 640):
        assert pixels(seen.images[0]).shape[:2] == (433, 213)  # averaged over blocks of three


def test_a_simulator_draws_for_itself(tmp_path):
    class Painter:
        def draw(self, output):
            return np.full((9, 8, 3), np.clip(output[0] / 4, 0, 1)) * [1.0, 0.5, 0.0]

    target = [2.0, 7.0]
    seen = page(make(target, output=np.array([4.0, 7.0])), target, tmp_path, simulator=Painter())
    assert [i["alt"] for i in seen.images] == ["target", "start", "fit", "residual"]
    np.testing.assert_allclose(pixels(seen.images[0])[0, 0, :3], [0.5, 0.25, 0.0], atol=1 / 255)
    np.testing.assert_allclose(pixels(seen.images[2])[0, 0, :3], [1.0, 0.5, 0.0], atol=1 / 255)

    class Broken:
        def draw(self, output):
            return np.zeros(3)

    seen = page(make(target), target, tmp_path, simulator=Broken())
    assert "Expected a picture of shape (H, W) or (H, W, 3) from draw, got (3,)." in seen.text
    assert ["0", "2", "1", "2.5"] in seen.rows


def test_failed_runs_and_an_interrupted_fit(tmp_path):
    target = np.zeros((16, 16))
    nothing = np.full((16, 16), np.nan)
    result = make(
        target,
        output=nothing,
        start_output=nothing,
        history=(),
        stop_reason="interrupted",
        standard_error=None,
        loss=np.nan,
    )
    seen = page(result, target, tmp_path)
    assert "The fit was interrupted after 0 steps" in seen.text
    assert "The run at the fit failed" in seen.text
    assert "No step was finished." in seen.text
    assert [i["alt"] for i in seen.images] == ["target"]
    history = (FitStep(0, np.nan, 1.0, (np.nan, 1.0), 64), FitStep(1, np.inf, 1.0, (1.0, 1.0), 128))
    page(make(target, history=history), target, tmp_path)


def test_many_parameters(tmp_path):
    d = 60
    covariance = np.eye(d)
    covariance[3, 50] = covariance[50, 3] = -0.7
    names = tuple(f"p{i}" for i in range(d))
    seen = page(make([1.0], names, parameters=np.ones(d), covariance=covariance), [1.0], tmp_path)
    assert ["p3", "p50", "-0.700"] in seen.rows
    assert "Of 60 parameters the 12 that moved most" in seen.text


def test_without_matplotlib_there_are_words_and_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    target = np.zeros((16, 16))
    seen = page(make(target), target, tmp_path)
    assert "pip install 'simulation-bridge[report]'" in seen.text
    assert ["a", "1.000", "0.020", "um", "0", "-5 to 5", ""] in seen.rows
    assert not seen.images
    assert "svg" not in seen.tags


@settings(deadline=None, max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(EVIL)
@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12))
def test_names_are_text_and_nothing_else(tmp_path, name):
    result = make([1.0], (name,), warnings=(name,), method=name)
    seen = page(result, [1.0], tmp_path, title=name, settings={name: name}, command=name)
    assert {"script", "img", "a", "iframe"}.isdisjoint(seen.tags)
    assert seen.text.count(name) >= 7  # title, heading, warning, parameter, method, setting and its value, command
    assert any(row[0] == name and row[1] == "1.000" for row in seen.rows)


def test_the_same_fit_gives_the_same_page(tmp_path):
    target = np.arange(400.0).reshape(20, 20)
    files = [write_report(make(target), target, tmp_path / name).read_bytes() for name in ("a.html", "b.html")]
    assert files[0] == files[1]


def test_the_table_on_the_terminal():
    told = make([1.0], warnings=("b is not determined by the target: " + "so it is " * 20,), method="kriging")
    lines = str(told).splitlines()
    assert lines[1].split() == ["a", "1.000", "0.020", "0", "um"]
    assert lines[3] == "loss 0.001"
    assert lines[4] == "converged after 5 steps, 1,234 simulations, 3 min 20 s (kriging)"
    assert lines[5].startswith("! b is not determined")
    assert all(len(line) <= 100 for line in lines)
    assert "chi-square 7.25 for 9 degrees of freedom (p = 0.61)" in str(
        make([1.0], chi_square=7.25, dof=9, p_value=0.6109)
    )
    assert "(p < 1e-12)" in str(make([1.0], chi_square=1e6, dof=9, p_value=0.0))


def test_a_value_by_its_name():
    assert make([1.0])["b"] == 2.0
    with pytest.raises(InputError, match=r"parameters a, b, got 'c'"):
        make([1.0])["c"]
