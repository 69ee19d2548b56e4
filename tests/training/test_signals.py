"""A run that is asked to stop stops within a step, and goes on to the same result as one that was not."""

import json
import multiprocessing
import os
import signal
import sys
import threading
import time

import pytest

import lora_sft.training.trainer
from lora_sft import finetune
from lora_sft.errors import RunError
from lora_sft.training.signals import SIGNALS, Stop, StoppedError
from tests.conftest import FEW, HARBOUR, logged

RUN = FEW | {
    "max_steps": 5,
    "gradient_accumulation_steps": 3,
    "lora_dropout": 0.1,
    "learning_rate": 1e-3,
    "save_total_limit": 1,
    "preflight": False,  # the micro-batches are counted
}
"""28 rows: 7 micro-batches an epoch, so that steps have 3, 3, 1, 3 and 3 of them."""
MICRO_BATCHES, LAST_OF_A_STEP = 13, (2, 5, 6, 9, 12)


def step_with(micro_batch: int) -> int:
    """The step to which a micro-batch belongs, both counted over the whole run, from 0 and from 1."""
    return 1 + sum(last < micro_batch for last in LAST_OF_A_STEP)


@pytest.fixture(autouse=True)
def nobody_ignores_signals():
    """As in a terminal, also where the tests run under nohup or in the background."""
    before = {signum: signal.getsignal(signum) for signum in SIGNALS}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    """The run that nobody stops."""
    return finetune(base, HARBOUR, output_dir=tmp_path_factory.mktemp("runs") / "whole", **RUN)


def send_at(monkeypatch, micro_batch: int, signum: int):
    """Sends the signal while a micro-batch is computed."""
    count = iter(range(10_000))

    def loss(*args):
        if next(count) == micro_batch:
            os.kill(os.getpid(), signum)
        return forward_loss(*args)

    forward_loss = lora_sft.training.trainer.forward_loss
    monkeypatch.setattr(lora_sft.training.trainer, "forward_loss", loss)


def stop_and_resume(base, folder, monkeypatch, micro_batch, signum, **settings):
    """Stops a run at a micro-batch, looks at what is there, and goes on → the finished run."""
    with monkeypatch.context() as patch:
        send_at(patch, micro_batch, signum)
        with pytest.raises(StoppedError) as stopped:
            finetune(base, HARBOUR, output_dir=folder, **settings)
    step = step_with(micro_batch)
    assert stopped.value.exit_code == 128 + signum
    assert f"stopped by {signal.Signals(signum).name} after step {step} of 5" in str(stopped.value)
    assert [one.name for one in folder.glob("checkpoint-*")] == [f"checkpoint-{step}"]
    assert not {"adapter_model.safetensors", "manifest.json", "README.md"} & {one.name for one in folder.iterdir()}
    return finetune(base, HARBOUR, output_dir=folder, **settings | {"resume_from_checkpoint": True})


def numbers(folder) -> list[dict]:
    """What was logged, but for how long it took."""
    return [
        {name: value for name, value in line.items() if not set(name.split("_")) & {"second", "runtime"}}
        for line in logged(folder)
    ]


def assert_same(one, other):
    assert (one / "adapter_model.safetensors").read_bytes() == (other / "adapter_model.safetensors").read_bytes()
    assert numbers(one) == numbers(other)


@pytest.mark.parametrize(
    ("signum", "micro_batch"), [(signal.SIGINT, 0), (signal.SIGTERM, 4), (signal.SIGHUP, 6), (signal.SIGTERM, 12)]
)
def test_a_stopped_run_goes_on_to_the_same_bits(base, whole, tmp_path, monkeypatch, signum, micro_batch):
    run = stop_and_resume(base, tmp_path / "run", monkeypatch, micro_batch, signum, **RUN)
    assert_same(run.output_dir, whole.output_dir)


@pytest.mark.slow
@pytest.mark.parametrize("signum", SIGNALS)
@pytest.mark.parametrize("micro_batch", range(MICRO_BATCHES))
def test_it_may_be_stopped_at_any_micro_batch(base, whole, tmp_path, monkeypatch, signum, micro_batch):
    run = stop_and_resume(base, tmp_path / "run", monkeypatch, micro_batch, signum, **RUN)
    assert_same(run.output_dir, whole.output_dir)


@pytest.mark.slow
def test_evaluations_and_the_best_adapter_are_the_same_too(base, tmp_path, monkeypatch):
    """An epoch ends in step 3 and one in step 6; what is evaluated there is evaluated once."""
    judged = RUN | {
        "eval_size": 4,
        "gradient_accumulation_steps": 2,
        "save_strategy": "epoch",
        "load_best_model_at_end": True,
        "save_total_limit": 2,
        "learning_rate": 2e-2,
    }
    whole = finetune(base, HARBOUR, output_dir=tmp_path / "whole", **judged)
    for micro_batch in range(0, 10, 2):
        folder = tmp_path / str(micro_batch)
        with monkeypatch.context() as patch:
            send_at(patch, micro_batch, signal.SIGTERM)
            with pytest.raises(StoppedError):
                finetune(base, HARBOUR, output_dir=folder, **judged)
        run = finetune(base, HARBOUR, output_dir=folder, **judged | {"resume_from_checkpoint": True})
        assert_same(run.output_dir, whole.output_dir)


def test_signals_mean_what_they_meant_when_the_run_is_over(base, tmp_path, monkeypatch):
    def mine(signum, frame):
        """A handler of the program that trains."""

    signal.signal(signal.SIGTERM, mine)
    with monkeypatch.context() as patch:
        send_at(patch, 0, signal.SIGTERM)
        with pytest.raises(StoppedError):
            finetune(base, HARBOUR, output_dir=tmp_path / "run", **FEW | {"preflight": False})
    assert signal.getsignal(signal.SIGTERM) is mine


def test_an_ignored_signal_stays_ignored():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with Stop() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    assert stop.signum is None


def test_outside_the_main_thread_nothing_is_installed():
    handlers = []

    def listen():
        with Stop():
            handlers.extend(signal.getsignal(signum) for signum in SIGNALS)

    before = [signal.getsignal(signum) for signum in SIGNALS]
    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert handlers == before


def test_two_signals_at_once_are_one_wish_and_a_later_one_ends_at_once(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with Stop() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signum == signal.SIGTERM
        now[0] += 2
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


# --- real processes: forked from one that has imported everything ------------------------------------


def train_in_a_process(words, seconds_a_micro_batch):
    """What a forked process does: the command line, slowed down so that signals meet it in the middle."""
    from lora_sft.cli import main

    forward_loss = lora_sft.training.trainer.forward_loss

    def slow(*args):
        time.sleep(seconds_a_micro_batch)
        return forward_loss(*args)

    lora_sft.training.trainer.forward_loss = slow
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115, PTH123 - held until the process ends
    for signum, handler in zip(SIGNALS, (signal.default_int_handler, signal.SIG_DFL, signal.SIG_DFL), strict=True):
        signal.signal(signum, handler)
    main(words)


@pytest.fixture(scope="module")
def processes():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lora_sft.api", "lora_sft.training.run", "tests.training.test_signals"])
    return context


def words_for(base, folder, **more):
    settings = {**RUN, **more, "model": base, "dataset": HARBOUR, "output_dir": folder}
    return ["train", *(f"{name}={value}" for name, value in settings.items() if name != "listeners")]


def wait_for_lines(folder, count):
    """Waits until so many steps are logged."""
    deadline = time.monotonic() + 120
    while not (folder / "metrics.jsonl").is_file() or len(logged(folder)) < count:
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
def test_processes_that_are_signalled_from_outside_end_in_order(base, whole, tmp_path, processes):
    for signum in SIGNALS:
        for steps in (1, 4):
            folder = tmp_path / f"{signum}-{steps}"
            process = processes.Process(target=train_in_a_process, args=(words_for(base, folder), 0.05))
            process.start()
            wait_for_lines(folder, steps)
            os.kill(process.pid, signum)
            process.join(60)
            assert process.exitcode == 128 + signum
            (checkpoint,) = folder.glob("checkpoint-*")
            assert checkpoint.name == f"checkpoint-{steps + 1}"
            assert not (folder / "manifest.json").exists()
            assert not (folder / "adapter_model.safetensors").exists()
            run = finetune(base, HARBOUR, output_dir=folder, **RUN | {"resume_from_checkpoint": True})
            assert_same(run.output_dir, whole.output_dir)


@pytest.mark.slow
def test_a_second_signal_ends_a_process_at_once(base, tmp_path, processes):
    process = processes.Process(target=train_in_a_process, args=(words_for(base, tmp_path / "run"), 3.0))
    process.start()
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "metrics.jsonl").is_file():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(1)  # in the first micro-batch of nine seconds
    os.kill(process.pid, signal.SIGTERM)
    time.sleep(1.5)
    asked = time.monotonic()
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    assert process.exitcode == -signal.SIGTERM
    assert time.monotonic() - asked < 3
    assert not list((tmp_path / "run").glob("checkpoint-*"))


@pytest.mark.slow
def test_of_two_processes_both_stop_at_the_step_in_which_one_is_asked(base, tmp_path):
    """The launcher of several processes gives each the same error; there is one checkpoint, of the main process."""
    script = tmp_path / "stopped.py"
    script.write_text(
        "import os, signal\n"
        "import lora_sft.training.trainer as trainer\n"
        "from lora_sft.cli import main\n"
        "forward_loss, count = trainer.forward_loss, iter(range(1000))\n"
        "def loss(*args):\n"
        "    if next(count) == 2 and os.environ['RANK'] == '1':\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return forward_loss(*args)\n"
        "trainer.forward_loss = loss\n"
        f"main({[str(word) for word in words_for(base, tmp_path / 'run', gradient_accumulation_steps=1)]!r})\n"
    )
    import subprocess

    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29618"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([*launcher, str(script)], env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert "stopped by SIGTERM after step 3 of 5" in done.stderr
    assert [one.name for one in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-3"]
    assert json.loads((tmp_path / "run/checkpoint-3/trainer_state.json").read_text())["global_step"] == 3
    assert not (tmp_path / "run/manifest.json").exists()


def test_a_stop_is_an_error_of_the_run():
    assert issubclass(StoppedError, RunError)
