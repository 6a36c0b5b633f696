"""What somebody new gets wrong in the first minutes: each mistake gets its own sentence, with what to do."""

from __future__ import annotations

import re
import sys

import numpy as np
import pytest
import torch

import bridge
from bridge.cli.main import main
from bridge.errors import EvaluationError, InputError

THETA = torch.tensor([0.3, 0.5])


def sines(theta):
    return np.sin(np.outer(theta, np.arange(1, 6))).sum(axis=0)


def two(a, b):
    return np.array([a + b, a * b])


def three(a, b, c=1.0, *, d=2.0):
    return np.array([a + b + c])


def noisy(theta, seed):
    return sines(theta) + np.random.default_rng(seed).normal(size=5)


TARGET = sines([0.35, 0.42])
NAMED = bridge.as_simulator(sines, names=["width_nm", "angle_deg"], bounds=[(0, 1), (0, 1)])


def of_smooth(simulator, **settings):
    return lambda: bridge.smooth(simulator, **{"seed": 0, "num_samples": 8, **settings})(THETA)


def of_simulator(**settings):
    return lambda: bridge.as_simulator(sines, **settings)


def of_fit(simulator=NAMED, target=TARGET, start=(0.3, 0.5), **settings):
    return lambda: bridge.fit(simulator, target, start, **{"seed": 0, **settings})


MISTAKES = {
    "several arguments": (
        of_smooth(two),
        "Expected a function f(theta), got two(a, b). All parameters come as one array: unpack it, a, b = theta, or "
        "give lambda theta: two(*theta).",
    ),
    "several arguments of a fit": (of_fit(two), "give lambda theta: two(*theta)."),
    "arguments with defaults": (of_smooth(three), "unpack it, a, b = theta"),
    "none": (of_smooth(lambda: 1.0), "Expected a function f(theta), got <lambda>()."),
    "a seed that is not declared": (
        of_smooth(noisy),
        "If 'seed' is the seed of its noise, declare it: bridge.as_simulator(noisy, seeded=True).",
    ),
    "a seed that is not taken": (
        of_simulator(seeded=True),
        "Expected a function f(theta, seed), got sines(theta). With seeded=True it is called with its seed as well: "
        "add an argument, def sines(theta, seed), or leave seeded=True out.",
    ),
    "a seed that is not taken, all rows": (of_simulator(seeded=True, vectorized=True), "got sines(theta)"),
    "a simulator's name": (of_smooth("cryoet"), "bridge.make('cryoet', ...) makes the one of that name."),
    "iterations": (
        of_fit(iterations=10),
        "Unknown argument 'iterations' of bridge.fit. Give method=bridge.Adam(steps=...), or another method.",
    ),
    "n_steps": (of_fit(n_steps=10), "Give method=bridge.Adam(steps=...)"),
    "lr": (of_fit(lr=0.1), "Give method=bridge.Adam(learning_rate=...)"),
    "optimizer": (of_fit(optimizer="Adam"), "Give method=bridge.Torch(optimiser=...)."),
    "restarts": (of_fit(restarts=3), "Give method=bridge.Kriging(restarts=...)."),
    "max_runs": (of_fit(max_runs=100), "Unknown argument 'max_runs' of bridge.fit. Give stop=bridge.Stop(runs=...)."),
    "maxfev": (of_fit(maxfev=100), "Give stop=bridge.Stop(runs=...)."),
    "loss": (of_fit(loss="mse"), "Give misfit=loss, a function of output and target."),
    "a mask": (of_fit(mask=TARGET > 1), "Give misfit=bridge.LeastSquares(mask=...)."),
    "a directory": (of_fit(directory="runs"), "Give run=bridge.Run(directory, ...)."),
    "a callback": (of_fit(callback=print), "Give watch="),
    "verbose": (of_fit(verbose=True), "Give watch="),
    "num_starts": (of_fit(num_starts=4), "Give start=bridge.Starts(number, given)."),
    "the timeout of a fit": (of_fit(timeout=4), "Give on=bridge.Workers(8, timeout_s=...), or on=bridge.Isolated("),
    "workers of a smoothing": (of_smooth(sines, workers=4), "of bridge.smooth. Give on=bridge.Workers(8), or on=8."),
    "a store": (of_smooth(sines, store=3), "Give memory=bridge.Store(...), or memory=bridge.Memory(store=...)."),
    "retries": (of_smooth(sines, retries=3), "Give failures=bridge.Raise(retries=...)"),
    "a loss that is smoothed": (of_smooth(sines, loss=3), "Give bridge.smooth_loss(simulator, loss, ...)."),
    "sigma": (of_fit(sigma=0.1), "Did you mean 'variance', its square?"),
    "n_jobs": (of_fit(n_jobs=2), "Give on=bridge.Workers(8), or on=8."),
    "bounds of a fit": (of_fit(bounds=[(0, 1)]), "The simulator says it: give bridge.as_simulator(f, bounds=...)"),
    "nothing near": (of_fit(banana=1), "Known: simulator, target, start, seed, method"),
    "num_sample": (of_smooth(sines, num_sample=8), "of bridge.smooth. Did you mean 'num_samples'?"),
    "num_sample of a loss": (
        lambda: bridge.smooth_loss(sines, torch.sum, seed=0, num_sample=8),
        "of bridge.smooth_loss. Did you mean 'num_samples'?",
    ),
    "no function as loss": (lambda: bridge.smooth_loss(sines, "mse", seed=0), "Expected a function of one output"),
    "bound": (of_simulator(bound=[(0, 1)]), "Unknown argument 'bound' of bridge.as_simulator. Did you mean 'bounds'?"),
    "budgets": (lambda: bridge.study(sines, [0.3], seed=0, budgets=1), "Did you mean 'budget'?"),
    "one pair of bounds": (of_simulator(bounds=(0, 1)), "bounds=[(0, 1), ...]"),
    "text as a bound": (of_simulator(bounds=[("0", 1)]), "as bounds of parameter 'p0', numbers or None, got ('0', 1)"),
    "three bounds": (of_simulator(bounds=[(0, 1, 2)]), "Expected (lower, upper) as bounds of parameter 'p0'"),
    "bounds of another": (
        of_simulator(names=["width", "angle"], bounds={"widht": (0, 1)}),
        "Unknown parameter 'widht'. Known parameters: width, angle. Did you mean 'width'?",
    ),
    "names as a text": (of_simulator(names="width, angle"), "Give names=['width', 'angle']."),
    "units as a text": (of_simulator(names=["a", "b"], units="nm"), "Give units=['nm']."),
    "names that are numbers": (of_simulator(names=[1, 2]), "Names are text: '1'."),
    "names as a mapping": (of_simulator(names={"a": 1}), "Give names=['a']."),
    "a number as natural scale": (of_simulator(natural_scale=0.1), "Give natural_scale=[0.1, ...]."),
    "text as natural scale": (of_simulator(natural_scale=["x"]), "natural_scale of parameter 'p0', got 'x'"),
    "scale of unnamed parameters": (of_smooth(sines, scale={"a": 1.0}), "bridge.as_simulator(f, names=['a'])"),
    "scale of others": (of_smooth(NAMED, scale={"width_nm": 1.0}), "got none for angle_deg"),
    "scale as a text": (of_smooth(sines, scale="0.1"), "Expected a scale that is a number, (2,) or (2, 2), got '0.1'."),
    "scale of a fit by name": (
        lambda: bridge.Kriging(scale={"width_nm": 0.1}),
        "bridge.as_simulator(f, natural_scale={'width_nm': 0.1})",
    ),
    "three scales of a fit": (of_fit(method=bridge.Adam(scale=(1, 2, 3))), "a number or (first, last), got (1, 2, 3)"),
    "a start of others": (
        of_fit(start={"width_nm": 0.3, "angle": 0.5}),
        "Unknown parameter 'angle'. Known parameters: width_nm, angle_deg. Did you mean 'angle_deg'?",
    ),
    "half a start": (of_fit(start={"width_nm": 0.3}), "Expected a value for each parameter, got none for angle_deg."),
    "a start by names that nobody gave": (
        of_fit(sines, start={"a": 0.3, "b": 0.5}),
        "Name them: bridge.as_simulator(f, names=['a', 'b']).",
    ),
    "NaN": (of_fit(start=[np.nan, 0.5]), "Expected a finite start, got {'width_nm': nan, 'angle_deg': 0.5}."),
    "a start outside": (
        of_fit(start=[3, 0.5]),
        "got width_nm = 3 outside [0, 1]. Move the start, or widen the bounds.",
    ),
    "an empty start": (of_fit(start=[]), "Expected a start of shape (d,)"),
    "no start": (of_fit(start=None), "Expected a start of shape (d,)"),
    "text as a start": (of_fit(start="0.3"), "Expected numbers as start, got the text '0.3'."),
    "text in a start": (of_fit(start={"width_nm": "x", "angle_deg": 1}), "a number for parameter 'width_nm', got 'x'"),
    "too long a start": (
        of_fit(start=[1, 2, 3]),
        "Expected 2 values (width_nm, angle_deg), got an array of shape (3,).",
    ),
    "another target": (of_fit(target=TARGET[:3]), "Expected a target of shape (5,), got (3,)."),
    "an empty target": (of_fit(target=[]), "Expected a target with numbers, got an empty one, of shape (0,)."),
    "a file as target": (of_fit(target="target.npy"), "Load the file first: numpy.load('target.npy')."),
    "nothing as target": (of_fit(target=None), "Expected real numbers as the target, got None."),
    "a mapping as target": (of_fit(target={"y": TARGET}), "got a dict with the keys 'y'. Give its values as one array"),
    "texts as target": (
        of_fit(target=["a"] * 5),
        "got text (dtype <U1). Give numbers: array.astype(float).",
    ),
    "a complex target": (of_fit(target=TARGET + 1j), "Give the real and imaginary parts"),
    "a target of Python objects": (
        of_fit(target=np.array(TARGET, dtype=object)),
        "Give numbers: np.array(..., dtype=float).",
    ),
    "text as variance": (of_fit(variance="0.1"), "Expected numbers as variance, got the text '0.1'."),
    "start and target exchanged": (of_fit(target=[0.3, 0.5], start=TARGET), "Expected 2 values"),
    "text as seed": (of_fit(seed="0"), "Expected a non-negative integer seed, got '0'."),
    "a generator as seed": (of_smooth(sines, seed=np.random.default_rng(0)), "Expected a non-negative integer seed"),
    "no samples": (of_smooth(sines, num_samples=0), "Expected at least one sample, got num_samples=0."),
    "no samples of a fit": (lambda: bridge.Adam(num_samples=0), "Expected at least one run a step, got 0."),
    "text as samples": (of_smooth(sines, num_samples="64"), "got num_samples='64'"),
    "text as steps": (lambda: bridge.Adam(steps="10"), "Expected at least one step, got '10'."),
    "text as rounds": (lambda: bridge.Kriging(rounds="10"), "Expected at least one round, got '10'."),
    "text as a number of runs": (lambda: bridge.Stop(runs="100"), "Expected runs of at least 2, got '100'."),
    "text as a stop": (of_fit(stop="100"), "bridge.Stop(runs=, seconds=, error=) or a number of runs as stop="),
    "text as seconds": (lambda: bridge.Stop(seconds="9"), "Expected positive seconds, got '9'."),
    "text as a number of workers": (lambda: bridge.Workers("4"), "Expected a positive integer of workers, got '4'."),
    "text as workers": (of_smooth(sines, on="4"), "A number of workers is given as one, on=8"),
    "a path as memory": (of_smooth(sines, memory="runs"), "bridge.Memory(...) or a bridge.Store as memory, got 'runs'"),
    "a path as store": (lambda: bridge.Memory(store="runs"), "Give store=bridge.Store('runs')."),
    "a number as run": (of_fit(run=3), "Expected the directory of a run as a path, got 3."),
    "values of what is fixed": (of_fit(fixed={"width_nm": 0.1}), "they keep their start. Give ['width_nm']."),
    "a name as fixed": (of_fit(fixed="width_nm"), "Expected a list of names, fixed=['width_nm'], got a text."),
    "pairs that are tied": (of_fit(tied=["a", "b"]), "Expected tied as name -> the name that it is to equal"),
    "a list of priors": (of_fit(prior=[(0, 1)]), "Expected prior[width_nm, angle_deg] = (mean, standard deviation)"),
    "a text in a prior": (
        of_fit(prior={"width_nm": ("x", 1)}),
        "Expected prior[width_nm] = (mean, standard deviation)",
    ),
    "a set as prior": (of_fit(prior={"width_nm": {1, 2}}), "Expected prior[width_nm] = (mean, standard deviation)"),
    "a number as prior": (of_fit(prior={"width_nm": 0.1}), "Expected prior[width_nm] = (mean, standard deviation)"),
    "a loss by name": (of_fit(misfit="mse"), "or a function loss(output, target) as misfit=, got 'mse'."),
    "a class as misfit": (of_fit(misfit=bridge.LeastSquares), "Expected bridge.LeastSquares(...)"),
    "a number that watches": (of_fit(watch=3), "a function of a FitStep, or a list of these, got 3."),
    "a class that watches": (of_fit(watch=bridge.LiveView), "Make one: watch=LiveView(...)."),
    "a penalty without its number": (of_smooth(sines, failures="penalty"), "Give its number: bridge.Penalty(value)."),
    "a method with a typo": (of_fit(method="krigging"), "Did you mean 'kriging'?"),
    "a method in capitals": (of_fit(method="Adam"), "Did you mean 'adam'?"),
    "integers": (lambda: bridge.smooth(sines, seed=0)(torch.tensor([0, 1])), "Use theta.double()."),
    "no parameters": (lambda: bridge.smooth(sines, seed=0)(None), "Expected a tensor of parameters"),
    "parameters by name": (lambda: bridge.smooth(NAMED, seed=0)({"width_nm": 1.0}), "in the order of the parameters"),
    "an unknown simulator": (
        lambda: bridge.make("cryo-et"),
        "Did you mean 'cryoet'? One of your own is named by its file: mysim.py:function.",
    ),
    "an unknown argument": (lambda: bridge.make("cryoet", specimn="helix"), "Did you mean 'specimen'?"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told(name):
    make, words = MISTAKES[name]
    with pytest.raises(InputError, match=re.escape(words)):
        make()


RAISED = {
    "all rows at once": (lambda x: x[:, 0], "declare bridge.as_simulator(f, vectorized=True)"),
    "torch inside": (lambda x: torch.sin(x), "begin with theta = torch.as_tensor(theta)"),
}


@pytest.mark.parametrize("name", RAISED)
def test_a_simulator_that_raises_is_told_what_it_was_given(name):
    function, words = RAISED[name]
    with pytest.raises(EvaluationError, match=re.escape(words)):
        of_smooth(function)()


def test_functions_of_one_array_are_taken_whatever_their_further_arguments():
    class Callable:
        def __call__(self, theta, gain=1.0):
            return gain * theta

    for function in (Callable(), np.cumsum, three.__get__(1.0), lambda *theta: theta[0], lambda t, **more: t):
        assert bridge.smooth(function, seed=0, num_samples=4)(THETA).shape[0] in (1, 2)
    seeded = bridge.as_simulator(lambda theta, seed=0: theta, seeded=True)
    assert bridge.smooth(seeded, seed=0, num_samples=4)(THETA).shape == (2,)


@pytest.mark.parametrize(
    ("described", "expected"),
    [
        ({"bounds": [(0, None), None]}, [(0, np.inf), (-np.inf, np.inf)]),
        ({"bounds": [(None, 2), (-1, 1)]}, [(-np.inf, 2), (-1, 1)]),
        ({"bounds": {"b": (0, 3)}, "names": ["a", "b"]}, [(-np.inf, np.inf), (0, 3)]),
        ({"bounds": {"a": (0, 1), "b": (0, None)}}, [(0, 1), (0, np.inf)]),
        ({"bounds": {"a": None}, "natural_scale": {"b": 2.0}}, [(-np.inf, np.inf)] * 2),
        ({"bounds": np.array([[0.0, 1.0], [2.0, 3.0]])}, [(0, 1), (2, 3)]),
    ],
)
def test_bounds_by_name_and_none(described, expected):
    space = bridge.as_simulator(sines, **described).space
    assert list(zip(space.lower, space.upper, strict=True)) == expected
    assert space.names == (("p0", "p1") if isinstance(described["bounds"], list | np.ndarray) else ("a", "b"))


def test_scales_by_name_are_those_of_the_vector():
    sim = bridge.as_simulator(sines, names=["a", "b"], natural_scale={"b": 3.0}, units={"a": "nm"})
    assert sim.space.natural_scale.tolist() == [1.0, 3.0]
    assert [p.unit for p in sim.space.parameters] == ["nm", ""]
    by_name = bridge.smooth(sim, seed=0, num_samples=8, scale={"b": 0.2, "a": 0.1})
    by_order = bridge.smooth(sim, seed=0, num_samples=8, scale=torch.tensor([0.1, 0.2], dtype=torch.float64))
    assert torch.equal(by_name(THETA), by_order(THETA))
    assert torch.equal(by_name(THETA, scale={"a": 0.3, "b": 0.2}), by_order(THETA, scale=np.array([0.3, 0.2])))


def test_signatures_are_still_those_of_the_functions():
    from inspect import signature

    assert "num_samples" in signature(bridge.smooth).parameters
    assert bridge.smooth.__doc__
    assert list(signature(bridge.as_simulator).parameters)[:2] == ["function", "names"]


# --- the command line ---------------------------------------------------------------------------------------------

MYSIM = '''
import numpy as np
import bridge
from helper import gravity


def projectile(theta):
    """A stone."""
    angle, speed = np.radians(theta[0]), theta[1]
    t = np.linspace(0, 2, 9)
    return np.stack([speed * np.cos(angle) * t, speed * np.sin(angle) * t - gravity / 2 * t**2])


def with_gravity(gravity=9.8):
    return bridge.as_simulator(projectile, names=["angle_deg", "speed"])


class Gun:
    space = bridge.ParameterSpace((bridge.Parameter("angle_deg", "deg", 0, 90), bridge.Parameter("speed")))
    output_shape = (2, 9)

    def __init__(self, length=1.0):
        self.length = length

    def __call__(self, inputs, seeds):
        return np.stack([projectile(x) for x in inputs])


gun = Gun()
number = 3
'''
JOB = """
[simulator]
name = "mysim.py:projectile"
bounds = { angle_deg = [0, 90] }
[target]
file = "target.npy"
[start]
angle_deg = 30.0
speed = 8.0
[fit]
seed = 0
stop = 12
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "mysim.py").write_text(MYSIM, encoding="utf-8")
    (tmp_path / "helper.py").write_text("gravity = 9.8\n", encoding="utf-8")
    (tmp_path / "job.toml").write_text(JOB, encoding="utf-8")
    np.save(tmp_path / "target.npy", np.zeros((2, 9)))
    monkeypatch.chdir(tmp_path.parent)
    path = list(sys.path)
    yield tmp_path
    for name in ("mysim", "helper", "_file_mysim"):
        sys.modules.pop(name, None)
    sys.path[:] = path


@pytest.mark.parametrize(
    ("change", "settings"),
    [
        (("", ""), []),
        (("projectile", "with_gravity"), ["gravity = 9.7"]),
        (("projectile", "Gun"), ["length = 2.0"]),
        (("projectile", "gun"), []),
        (("speed = 8.0", "speed = 8.0\n"), ['units = { angle_deg = "deg" }', "natural_scale = [5.0, 1.0]"]),
    ],
    ids=["a function", "a factory", "a class", "an instance", "options of as_simulator"],
)
def test_a_job_file_takes_a_simulator_from_a_file_beside_it(folder, capsys, change, settings):
    text = JOB.replace(*change) if change[0] else JOB
    if change[0] == "projectile":
        text = text.replace("bounds = { angle_deg = [0, 90] }\n", "")
    (folder / "job.toml").write_text(text.replace("[target]", "\n".join([*settings, "[target]"])), encoding="utf-8")
    assert main(["fit", str(folder / "job.toml"), "-o", str(folder / "out"), "-q"]) == 0
    assert "angle_deg" in capsys.readouterr().out
    assert (folder / "out" / "parameters.json").is_file()


def test_other_processes_find_the_function_of_a_file(folder, capsys):
    text = JOB.replace("seed = 0", "seed = 0\non = 1")
    (folder / "job.toml").write_text(text, encoding="utf-8")
    assert main(["fit", str(folder / "job.toml"), "-o", str(folder / "out"), "-q"]) == 0


def test_info_and_study_take_a_simulator_from_a_file(folder, capsys):
    assert main(["info", str(folder / "mysim.py:projectile")]) == 0
    assert "A stone." in capsys.readouterr().out
    assert main(["info", str(folder / "mysim.py:gun")]) == 0
    assert "angle_deg [0, 90] deg" in capsys.readouterr().out
    assert main(["study", str(folder / "job.toml"), "--budget", "3000", "-o", str(folder / "study")]) == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ((":projectile", ":projectil"), "Unknown 'projectil' in mysim.py. It has: projectile, with_gravity, Gun, gun"),
        ((":projectile", ":projectil"), "Did you mean 'projectile'?"),
        ((":projectile", ""), "Expected the function beside the file, mysim.py:function"),
        ((":projectile", ":number"), "Expected a function or a simulator as 'mysim.py:number', got int."),
        (("mysim.py", "mysym.py"), "mysym.py', which is not a file"),
        (("bounds = {", "bound = {"), "Unknown argument 'bound' of 'mysim.py:projectile'. Did you mean 'bounds'?"),
        (("seed = 0", "seeed = 0"), "Unknown setting 'seeed' in [fit]"),
        (("stop = 12", "maxiter = 12"), "Unknown setting 'maxiter' in [fit]"),
        (("stop = 12", "maxiter = 12"), 'Give method = { name = "gauss-newton", steps = ... }.'),
        (("stop = 12", "max_runs = 12"), "Give stop = { runs = ... }."),
        (("stop = 12", "workers = 2"), 'Give on = { name = "workers", number = ... }.'),
        (
            ("stop = 12", "stop = { rums = 12 }"),
            "Expected the arguments of 'stop', got an unexpected keyword argument 'rums'",
        ),
        (("stop = 12", "stop = { rums = 12 }"), "Did you mean 'runs'?"),
        (("stop = 12", "stop = { runs = 1 }"), "Expected runs of at least 2, got 1."),
        (("stop = 12", 'method = { name = "adm" }'), "Did you mean 'adam'?"),
        (
            ("stop = 12", 'method = { name = "adam", rounds = 3 }'),
            "arguments of 'method', got an unexpected keyword argument 'rounds'",
        ),
        (("stop = 12", 'on = { name = "threads" }'), "one of ranks, process, workers in on, got 'threads'"),
        (("file = ", "fil = "), "Unknown setting 'fil' in [target]"),
        (("[start]", "[strat]"), "got unknown [strat]. Did you mean 'start'?"),
        (("[fit]", "[output]\ndir = 1\n[fit]"), "Unknown setting 'dir' in [output]"),
        (("seed = 0", "seed = "), "at line 11"),
        (("angle_deg = [0, 90]", "angle = [0, 90]"), "Unknown parameter 'angle'"),
        (("name =", "nam ="), 'name = "mysim.py:function"'),
    ],
)
def test_a_mistake_in_a_job_file_is_told(folder, capsys, change, words):
    (folder / "job.toml").write_text(JOB.replace(*change), encoding="utf-8")
    assert main(["fit", str(folder / "job.toml"), "-o", str(folder / "out")]) == 2
    assert words in capsys.readouterr().err
    assert not (folder / "out").exists()


def test_a_file_that_does_not_run_is_told_with_its_line(folder, capsys):
    (folder / "mysim.py").write_text("x = 1\ny = x +\n", encoding="utf-8")
    assert main(["info", str(folder / "mysim.py:f")]) == 2
    assert "SyntaxError" in (said := capsys.readouterr().err)
    assert "line 2" in said
    (folder / "mysim.py").write_text("import os\n\nimport nowhere_at_all\n", encoding="utf-8")
    assert main(["info", str(folder / "mysim.py:f")]) == 2
    assert "No module named 'nowhere_at_all' (line 3)" in capsys.readouterr().err


def test_a_missing_job_file(capsys):
    assert main(["fit", "nowhere.toml"]) == 2
    assert "Expected a job file (TOML), got 'nowhere.toml', which is not a file." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["fti", "job.toml"], "unknown command 'fti'. Did you mean 'fit'?"),
        (["job.toml"], "Did you mean 'bridge fit job.toml'?"),
        (["script.py"], "Did you mean 'bridge run script.py'?"),
        (["banana"], "Known: list, info,"),
        (["fit"], "the following arguments are required: file"),
    ],
)
def test_a_mistake_in_a_command_is_told(words, said, capsys):
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    assert said in capsys.readouterr().err


def test_no_command_shows_what_there_is(capsys):
    assert main([]) == 2
    said = capsys.readouterr().err
    assert "recover parameters from a target, as a job file says" in said
    assert "exit codes:" in said


@pytest.mark.parametrize(
    "settings",
    [
        lambda number: {"stop": bridge.Stop(runs=number(100))},
        lambda number: {"stop": number(40)},
        lambda number: {"method": bridge.Adam(num_samples=number(8), steps=number(3))},
        lambda number: {"method": bridge.Kriging(rounds=number(3), round_size=number(4), restarts=number(1))},
        lambda number: {
            "method": bridge.TrustRegion(rounds=number(3), round_size=number(4)),
            "misfit": lambda y, t: ((y - t) ** 2).sum(),
        },
        lambda number: {"start": bridge.Starts(number(2), [0.5, 0.5]), "stop": 40},
    ],
)
def test_whole_numbers_may_be_floats(settings):
    def fit(start=(0.5, 0.5), **given):
        return bridge.fit(lambda p: p * [1.0, 2.0], np.array([1.0, 2.0]), start, seed=0, **given)

    assert (fit(**settings(float)).parameters == fit(**settings(int)).parameters).all()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"misfit": lambda a: a}, r"loss\(output, target\)"),
        ({"stop": 2.5}, "runs of at least 2, got 2.5"),
        ({"start": bridge.Starts(1, [[0.5], [0.6]])}, "at least the 2 starts"),
        ({"variance": 0.0}, "got 0"),
        ({"misfit": bridge.LeastSquares(1.0, robust=1)}, r"the name of a robust loss, \(name, width.*got 1\."),
        ({"misfit": bridge.LeastSquares(1.0, robust=("huber", "2"))}, r"got \('huber', '2'\)"),
        ({"misfit": bridge.LeastSquares(1.0, robust=bridge.Huber)}, r"Give an instance, Huber\(\.\.\.\)"),
        ({"fixed": True}, r'fixed=\["a"\], got True'),
        ({"prior": {1: 2}}, "names of parameters in prior=.*got 1"),
        ({"method": bridge.Adam(scale=True)}, "Expected positive scales.*got True"),
        ({"run": ""}, "directory of a run as a path, got ''"),
    ],
)
def test_values_of_other_kinds_are_told(given, said):
    with pytest.raises(bridge.InputError, match=said):
        bridge.fit(lambda p: p, np.array([1.0]), **{"start": [0.5], "seed": 0, **given})


def test_what_is_no_communicator_is_told():
    with pytest.raises(bridge.InputError, match=r"an mpi4py communicator as comm.*got 'world'"):
        bridge.Ranks("world")


def test_a_penalty_may_be_a_large_integer():
    assert bridge.Penalty(10**30).filling == 1e30
    with pytest.raises(bridge.InputError, match="Expected a finite value"):
        bridge.Penalty(10**400)


def test_a_level_that_is_no_number_is_told():
    result = bridge.fit(lambda p: p * [1.0, 2.0], np.array([1.0, 2.0]), [0.5, 0.5], seed=0, stop=bridge.Stop(runs=20))
    with pytest.raises(bridge.InputError, match="level between 0 and 1"):
        result.interval("a")
