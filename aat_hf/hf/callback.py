"""`AATCallback`: what attention does during training, where the other metrics go, and its tolerance by schedule."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from aat_hf.hf import operator
from aat_hf.hf.collector import OBSERVABLES, Collector, LayerSums, layer_metrics, merge, model_metrics
from aat_hf.hf.reporters import MetricsCallback
from aat_hf.hf.schedule import Curve, ToleranceSchedule
from aat_hf.hf.settings import configure, settings_of
from aat_hf.report.record import listen

_log = logging.getLogger("aat_hf")
_UNLOGGED_STEPS = 10  # one step in so many is sampled where logging does not go by steps


class AATCallback(MetricsCallback, ExportableState):
    """Adds the numbers of adaptive tiled attention to whatever the Trainer logs: `Trainer(callbacks=[AATCallback()])`.

    They reach `state.log_history`, trainer_state.json and every reporter, under "aat_...", in evaluations
    "eval_aat_...", averaged over processes:

    - density (mean, p10, p90 over heads), infidelity with the half width of its 95 % interval (infidelity_ci),
      heads_over_tolerance, tolerance
    - shares of calls: tiled_calls, skip_calls, dense_calls, and router_dense_calls (exact because that is faster);
      shares of tiles: tiles_exact, tiles_coarse, tiles_culled
    - ms_<stage> of the attention of one forward pass; tokens_per_second; peak_memory_mib of the process on its device
    - entropy (nats) and effective_rank of the heads, if asked for
    - layer<i>_density and layer<i>_infidelity, every `layer_steps` steps
    - vulkan_<name>: pool and cache rates (`aat_hf.vulkan.workspace.rates`), where Vulkan computes

    Attention is measured in one micro-batch of a sampled step, and in the first batch of an evaluation.

    Args:
        tolerance, start, schedule: the model's tolerance over the training, see `ToleranceSchedule`; the default
            leaves it alone.
        sample_steps: measure every so many steps; default: those that are logged.
        layer_steps: log layers one by one every so many steps; default: never.
        observables: "entropy", "effective_rank" or both: 32 rows of exact attention weights a sampled call.
        timing: whether to time the stages of attention in sampled steps (on CUDA that synchronises them).
        patience: warn of a head that has missed its tolerance, by more than chance, in so many samples in a row.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        *,
        tolerance: float | None = None,
        start: float | None = None,
        schedule: Curve = "constant",
        sample_steps: int | None = None,
        layer_steps: int | None = None,
        observables: Sequence[str] = (),
        timing: bool = True,
        patience: int = 3,
    ) -> None:
        super().__init__()
        for name, value in (("sample_steps", sample_steps), ("layer_steps", layer_steps), ("patience", patience)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} = {value!r}: must be a positive integer")
        if unknown := set(observables) - set(OBSERVABLES):
            raise ValueError(f"observables = {sorted(unknown)}: must be of {', '.join(OBSERVABLES)}")
        self.schedule = ToleranceSchedule(tolerance, start, schedule)
        self.sample_steps, self.layer_steps, self.patience = sample_steps, layer_steps, patience
        self.observables, self.timing = tuple(observables), timing
        self.misses: dict[str, int] = {}
        self._seconds, self._steps, self._tokens_before, self._began = 0.0, 0, 0, 0.0
        self._train: Collector | None = None
        self._eval: Collector | None = None

    def state(self) -> dict[str, Any]:
        """Arguments and counters, for the checkpoint."""
        arguments = {
            "tolerance": self.schedule.tolerance,
            "start": self.schedule.start,
            "schedule": self.schedule.name,
            "observables": list(self.observables),
        }
        arguments |= {name: getattr(self, name) for name in ("sample_steps", "layer_steps", "timing", "patience")}
        return {"args": arguments, "attributes": {"misses": dict(self.misses)}}

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Watch evaluations outside training."""
        self._watch(model)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Watch the model; continue a checkpoint's counters."""
        self._watch(model)
        self._seconds, self._steps, self._tokens_before = 0.0, 0, state.num_input_tokens_seen
        saved: Any = state.stateful_callbacks or {}
        stored = saved.get(type(self).__name__)
        if state.global_step and isinstance(stored, dict):  # a list is of several such callbacks: whose is it?
            self.misses = dict(stored["attributes"]["misses"])
        parts = (part for part in model.modules() if isinstance(part, PreTrainedModel))
        if not any(part.config._attn_implementation == "aat" for part in parts):
            _log.warning('no part of %s attends with "aat": AATCallback logs speed and memory', type(model).__name__)
        elif args.torch_compile and not operator.SUPPORTED:
            _log.warning(
                "torch %s compiles exact attention; tiles in a compiled model need torch 2.13", torch.__version__
            )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Set the step's tolerance; listen if it is sampled."""
        self._began = time.perf_counter()
        self._set_tolerance(args, state, model)
        if self._train is not None and _every(state.global_step + 1, self._sampling(args, state)):
            self._train.start()

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """One micro-batch is enough."""
        self._stop()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Take the step's time; listen to an evaluation that follows."""
        self._stop()
        self._seconds, self._steps = self._seconds + time.perf_counter() - self._began, self._steps + 1
        self._before_evaluation(control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Listen to an evaluation that follows."""
        self._before_evaluation(control)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """One batch is enough; in an evaluation outside training that is the second, the first event comes after it."""
        if self._eval is None:
            return
        if self._eval.listening:
            self._eval.stop()
        elif self._eval.empty:
            self._eval.start()

    def on_predict(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any, **kwargs: Any
    ) -> None:
        """A prediction logs nothing."""
        if self._eval is not None:
            self._eval.stop()
            self._eval.drain()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop listening, whatever ended the training."""
        self._stop()

    def metrics(
        self, args: TrainingArguments, state: TrainerState, logs: dict[str, Any], model: Any
    ) -> dict[str, float]:
        """What is known since the last log of training, or of the evaluation that `logs` are about."""
        evaluated = next((key for key in logs if key.startswith("eval") and key.endswith("_runtime")), None)
        if evaluated is not None and self._eval is not None:
            self._eval.stop()
            prefix, found = evaluated.removesuffix("runtime"), model_metrics(merge(_gather(self._eval.drain())))
        elif "loss" in logs and self._train is not None:
            prefix, found = "", self._training_metrics(args, state, model)
        else:
            return {}
        return {f"{prefix}aat_{name}": value for name, value in found.items()}

    def _training_metrics(self, args: TrainingArguments, state: TrainerState, model: Any) -> dict[str, float]:
        assert self._train is not None  # its caller looks
        processes = _gather((self._train.drain(), self._seconds, peak_memory_mib()))
        layers = merge(layers for layers, _, _ in processes)
        found = model_metrics(layers)
        found["tolerance"] = settings_of(model.config).tolerance
        found["peak_memory_mib"] = max(memory for _, _, memory in processes)
        tokens: float = state.num_input_tokens_seen - self._tokens_before
        if not tokens and layers:  # the Trainer does not count them: those of the sampled micro-batches stand for all
            a_call = layers[0].sums["tokens"][0] / layers[0].sums["calls"][0]
            tokens = a_call * args.gradient_accumulation_steps * len(processes) * self._steps
        seconds = max(seconds for _, seconds, _ in processes)
        if tokens and seconds:
            found["tokens_per_second"] = tokens / seconds
        self._seconds, self._steps, self._tokens_before = 0.0, 0, state.num_input_tokens_seen
        if self.layer_steps is not None and _every(state.global_step, self.layer_steps):
            found.update(layer_metrics(layers))
        self._warn(layers, state)
        return found | _vulkan_metrics()

    def _watch(self, model: Any) -> None:
        self._stop()  # an interrupted training left it listening
        self._train = Collector(model, self.observables, self.timing)
        self._eval = Collector(model, self.observables, self.timing)
        listen(self._train)
        listen(self._eval)

    def _stop(self) -> None:
        for collector in (self._train, self._eval):
            if collector is not None:
                collector.stop()

    def _before_evaluation(self, control: TrainerControl) -> None:
        if control.should_evaluate and self._eval is not None:
            self._eval.drain()
            self._eval.start()

    def _sampling(self, args: TrainingArguments, state: TrainerState) -> int:
        if self.sample_steps is not None:
            return self.sample_steps
        if args.logging_first_step and state.global_step == 0:
            return 1
        return int(state.logging_steps) if args.logging_strategy == "steps" else _UNLOGGED_STEPS

    def _set_tolerance(self, args: TrainingArguments, state: TrainerState, model: Any) -> None:
        wanted, now = self.schedule.at(state.global_step / max(1, state.max_steps)), settings_of(model.config).tolerance
        if wanted is None or wanted == now:
            return
        configure(model, tolerance=wanted)
        if args.torch_compile and (wanted == 0) != (now == 0):  # whether a layer may tile is fixed in its graph
            torch.compiler.reset()

    def _warn(self, layers: list[LayerSums], state: TrainerState) -> None:
        for layer in layers:
            for head, (mean, width) in enumerate(layer.infidelity()):
                key = f"{layer.name}:{head}"
                self.misses[key] = self.misses.get(key, 0) + 1 if mean - width > layer.tolerance else 0
                if self.misses[key] == self.patience and state.is_world_process_zero:
                    _log.warning(
                        "step %d: head %d of %s lost %.3f ± %.3f in its last sample and missed its tolerance %.3g in "
                        "%d samples in a row. Give its layer a smaller tolerance, or exact attention: "
                        "aat_hf.configure(model, layers={%s: {'mode': 'dense'}})",
                        *(state.global_step, head, layer.name, mean, width, layer.tolerance, self.patience),
                        layer.layer_idx,
                    )


def _gather(value: Any) -> list[Any]:
    """The values of all processes."""
    from accelerate.utils import gather_object  # the Trainer needs accelerate, this package does not

    return list(gather_object([value]))


def _every(step: int, interval: int) -> bool:
    return step % interval == 0


def peak_memory_mib() -> float:
    """Most memory allocated so far on the accelerator, or held by this process where there is none, in MiB."""
    if torch.accelerator.is_available() and torch.accelerator.current_accelerator().type != "mps":  # type: ignore[union-attr]
        return torch.accelerator.max_memory_allocated() / 2**20
    if sys.platform == "win32":
        import psutil  # comes with accelerate

        return float(psutil.Process().memory_info().peak_wset) / 2**20
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def _vulkan_metrics() -> dict[str, float]:
    """Pool and cache rates of the Vulkan backend, if it is in use."""
    workspace = sys.modules.get("aat_hf.vulkan.workspace")
    return {} if workspace is None else {f"vulkan_{name}": value for name, value in workspace.rates().items()}
