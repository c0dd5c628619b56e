"""The Hugging Face Trainer with our loss, our checkpoints and our run directory; the training loop is the library's."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from accelerate.utils import gather_object
from transformers.trainer_callback import ExportableState, PrinterCallback, TrainerState
from transformers.trainer_utils import EvalLoopOutput

from qlora_core.attention import base_of
from qlora_core.data.collate import REAL_TOKENS, Collator
from qlora_core.data.encode import Encoded
from qlora_core.data.stream import StreamedBlocks
from qlora_core.device import peak_memory_bytes
from qlora_core.errors import DataError, RunError
from qlora_core.packed import prepare_packed
from qlora_core.run import Run
from qlora_core.training import checkpoint
from qlora_core.training.arguments import full_checkpointing
from qlora_core.training.callbacks import EvaluateBeforeSaving, LogLastStep
from qlora_core.training.head import Head
from qlora_core.training.loss import causal_lm_loss, score
from qlora_core.training.nonfinite import Guard
from qlora_core.training.order import EpochOrder, FollowEpochs
from qlora_core.training.recompute import MODES, Mode, keep_all, settle
from qlora_core.training.signals import StopOnSignal

__all__ = ["QLoRATrainer"]


class QLoRATrainer(transformers.Trainer):
    """Trains the adapter of a quantised model and writes `metrics.jsonl` and `checkpoints/` of *run*.

    The data are the Blocks of *encoded*; where they are packed, the model is made ready for it, or refused with ModelError.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer: transformers.PreTrainedTokenizerBase,
        encoded: Encoded,
        args: transformers.TrainingArguments,
        run: Run,
        callbacks: list[transformers.TrainerCallback],
    ) -> None:
        self.run = run
        data = run.config.data
        blocks = [blocks for blocks in (encoded.train, encoded.eval) if blocks is not None]
        packed = any(split.packed for split in blocks)
        if packed:
            dtype = torch.float16 if args.fp16 else torch.bfloat16
            with torch.autocast(args.device.type, dtype=dtype, enabled=args.bf16 or args.fp16):
                prepare_packed(model)
        self._order = EpochOrder.of(encoded.train, args)
        self._generators: dict[str, Any] | None = None  # to be restored after the next batch
        self._evaluation_due: list[Any] | None = None  # the generators with which one is to be made up for, after resuming
        self._generators_now: Any = None  # those after it, with which training goes on
        self._stream_from = 0  # the step at which this process began to read a stream
        with _not_called_quantized(model):
            super().__init__(
                model=model,
                args=args,
                data_collator=Collator(
                    tokenizer.pad_token_id or 0,
                    data.pad_to_multiple_of,
                    packed=packed,
                    count=True,
                    longest=data.sequence_length,
                ),
                train_dataset=encoded.train,
                eval_dataset=encoded.eval,
                processing_class=tokenizer,
                compute_loss_func=causal_lm_loss,
                callbacks=[EvaluateBeforeSaving(), *callbacks, LogLastStep()],
            )
        self.remove_callback(PrinterCallback)
        if self._order is not None:
            self.add_callback(FollowEpochs(self._order))
        self._logged_tokens = 0
        self._logged_at = time.perf_counter()
        self._paused = 0.0
        self._head: tuple[Any, Head] | None = None  # and the model that it is of, wrapped or not
        self._guard = Guard(self)
        self._flops_per_token: int | None = None

    # What is trained on

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Return our order, unless `training.extra` asks for one of the library's."""
        return super()._get_train_sampler(train_dataset) if self._order is None else self._order

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Return the loss that the head computes, for inputs that hold only what a model takes; a cache would be of no use.

        Whoever asks for the outputs gets whole logits, and their loss.
        """
        taken = {name: value for name, value in inputs.items() if name != REAL_TOKENS}
        head = Head() if return_outputs else self._head_of(model)
        with head.computing(inputs["labels"], num_items_in_batch) as computed:

            def loss(outputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
                if computed.loss is None:
                    return causal_lm_loss(outputs, *args, **kwargs)
                # the logits are empty, so their sum is 0; by it what wraps the model sees the backward pass begin
                total: torch.Tensor = computed.loss + outputs.logits.sum()
                return total

            self.compute_loss_func = loss
            return super().compute_loss(model, {**taken, "use_cache": False}, return_outputs, num_items_in_batch)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Train an epoch, or nothing where the run was resumed from its end: the library looks only after a further step."""
        self._make_up_for_evaluation()
        if self.state.global_step < self.state.max_steps and not self.control.should_training_stop:
            super()._run_epoch(*args, **kwargs)
        else:
            self.control.should_training_stop = True

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """Finish; a run that was resumed from the end of its last epoch has come here at once."""
        self._make_up_for_evaluation()
        return super()._finalize_training(*args, **kwargs)

    def _make_up_for_evaluation(self) -> None:
        """Evaluate, where a signal kept the run from doing so after the step that it is resumed from, with its generators."""
        if self._evaluation_due is None:
            return
        generators, self._evaluation_due = self._evaluation_due, None
        self._restore(generators)
        if self.is_world_process_zero():
            self.run.drop_evaluation(self.state.global_step)  # of an earlier time that it was resumed from there
        self._determine_best_metric(metrics=self._evaluate(None, None), trial=None)
        if self.state.best_global_step:
            self.state.best_model_checkpoint = str(self.run.checkpoint(self.state.best_global_step))
        self.control.should_save = False  # what is to be kept is there: the checkpoint
        self._generators_now = checkpoint.rng_state()

    def _restore(self, generators: list[Any]) -> None:
        if self.args.process_index < len(generators):
            checkpoint.restore_rng(generators[self.args.process_index])

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Return the loss of a batch, whose gradients are added up."""
        loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
        self._guard.note(inputs, loss)
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Return the norm of the gradient; raise RunError where it, or a loss of the step, is not finite."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self._guard.check(float(norm))
        return norm

    def train(self, resume_from_checkpoint: str | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train, with those activations kept that `training.gradient_checkpointing` says."""
        if resume_from_checkpoint:
            self.args.eval_on_start = False  # that was done when the run began
        wanted = self.run.config.training.gradient_checkpointing
        try:
            if wanted in ("selective", "auto") and self._settle(wanted) == "full":
                for name, value in full_checkpointing().items():
                    setattr(self.args, name, value)
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            keep_all(self.model)

    def _settle(self, wanted: Literal["selective", "auto"]) -> Mode:
        """Return which activations are kept, in a step whose rows are as long as the configuration allows."""
        self.model.train()
        with self.accelerator.autocast():
            self._head_of(self.model)  # now, so that its passes are not measured
        rows, tokens = self.args.per_device_train_batch_size, self.run.config.data.sequence_length
        return settle(self.model, wanted, self._pass, rows, tokens, _most_frugal)

    def _pass(self, rows: int, tokens: int) -> None:
        """Run the forward pass of a step of *rows* x *tokens*; with gradients, for nothing."""
        vocabulary = base_of(self.model).config.get_text_config().vocab_size
        row = {"input_ids": [token % vocabulary for token in range(tokens)]}
        batch = self.data_collator([row] * rows)
        taken = {name: value.to(self.args.device) for name, value in batch.items() if torch.is_tensor(value)}
        del taken[REAL_TOKENS]
        labels = taken.pop("labels")
        with self.accelerator.autocast(), self._head_of(self.model).computing(labels) as computed:
            outputs = self.model(**taken, use_cache=False)
            if computed.loss is None:
                causal_lm_loss(outputs, labels)

    def _head_of(self, model: torch.nn.Module) -> Head:
        if self._head is None or self._head[0] is not model:
            self._head = model, Head.of(model)
        return self._head[1]

    # What is measured

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return the operations of a step as the library counts them, which counts all parameters each time."""
        if self._flops_per_token is None:
            self._flops_per_token = super().floating_point_ops(inputs) // inputs["input_ids"].numel()
        return self._flops_per_token * inputs["input_ids"].numel()  # type: ignore[no-any-return]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Complete *logs* with tokens, speed and memory, and write the line to `metrics.jsonl`."""
        if "loss" in logs:
            now, tokens = time.perf_counter(), self.state.num_input_tokens_seen
            seconds = now - self._logged_at - self._paused
            logs["tokens"] = tokens
            logs["tokens_per_second"] = round((tokens - self._logged_tokens) / max(seconds, 1e-9), 1)
            logs["peak_memory_bytes"] = peak_memory_bytes(self.args.device)
            self._logged_tokens, self._logged_at, self._paused = tokens, now, 0.0
        super().log(logs, start_time)
        if isinstance(self.train_dataset, StreamedBlocks):
            logs.pop("epoch", None)  # a stream has none; the library's number is the share of the steps since resuming
        if self.is_world_process_zero() and ("loss" in logs or "eval_loss" in logs):
            self.run.append_metrics({"step": self.state.global_step, **logs})

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        """Count tokens that are not padding; the library's way takes EOS for padding where they share an id."""
        count = int(inputs[REAL_TOKENS].sum())
        if self.args.world_size > 1:
            count = int(self.accelerator.gather(torch.tensor(count, device=self.args.device)).sum())
        self.state.num_input_tokens_seen += count

    @contextlib.contextmanager
    def _off_the_clock(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._paused += time.perf_counter() - started

    def evaluation_loop(self, dataloader: Any, description: str, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Return loss and perplexity per supervised token, over all tokens; no logits are kept."""
        prefix = kwargs.get("metric_key_prefix", "eval")
        model = self.model_wrapped
        if not self.accelerator._models:  # evaluating without having trained
            model = self.accelerator.prepare_model(self.model, evaluation_mode=True)
        model.eval()
        self.callback_handler.eval_dataloader = dataloader
        with self._off_the_clock():
            result = score(
                model,
                dataloader,
                device=self.args.device,
                gather=self.accelerator.gather_for_metrics,
                after_batch=lambda: self.callback_handler.on_prediction_step(self.args, self.state, self.control),
                head=self._head_of(model),
            )
        if not math.isfinite(result.loss):
            raise RunError(
                f"evaluation: the loss after step {self.state.global_step} is {result.loss}; {self.run.saved()}; "
                "start again with a lower training.learning_rate, or with training.mixed_precision: none"
            )
        metrics = {f"{prefix}_loss": result.loss, "perplexity": result.perplexity, f"{prefix}_tokens": result.tokens}
        return EvalLoopOutput(None, None, metrics, num_samples=len(dataloader.dataset))

    # Checkpoints: complete or absent, in the run directory, no pickle

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.store_flos()
        step = self.state.global_step
        if self.state.best_global_step:
            self.state.best_model_checkpoint = str(self.run.checkpoint(self.state.best_global_step))
        generators = gather_object([checkpoint.rng_state()])
        with self._off_the_clock():
            if self.args.should_save:
                exportable = [*self.callback_handler.callbacks, self.control]
                exported = TrainerState(stateful_callbacks=[c for c in exportable if isinstance(c, ExportableState)])
                self.state.stateful_callbacks = exported.stateful_callbacks
                scaler = self.accelerator.scaler
                with self.run.writing_checkpoint(step) as folder:
                    checkpoint.save_weights(self.accelerator.unwrap_model(self.model), folder)
                    checkpoint.save_tree(
                        {
                            "optimizer": self.optimizer.state_dict(),
                            "scheduler": self.lr_scheduler.state_dict(),
                            "scaler": scaler.state_dict() if scaler is not None else None,
                            "generators": generators,
                            "loss_since_log": self._tr_loss,
                            "step_of_last_log": self._globalstep_last_logged,
                            "stream": self._stream_state(),
                            "evaluation_due": self._evaluation_left_out(),
                        },
                        folder,
                        "state",
                    )
                    self.state.save_to_json(str(folder / "trainer_state.json"))
                self.run.rotate_checkpoints(self.args.save_total_limit, keep=self.state.best_global_step)
            self.accelerator.wait_for_everyone()

    def _evaluation_left_out(self) -> bool:
        """Return whether a signal has come that keeps an evaluation from being made after this step."""
        return any(c.evaluation_due for c in self.callback_handler.callbacks if isinstance(c, StopOnSignal))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        checkpoint.load_weights(self.accelerator.unwrap_model(self.model), Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint_path: str | None) -> None:
        if checkpoint_path is None:
            return
        state = checkpoint.load_tree(Path(checkpoint_path), "state")
        self.optimizer.load_state_dict(state["optimizer"])
        self.lr_scheduler.load_state_dict(state["scheduler"])
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self._logged_tokens = self.state.num_input_tokens_seen
        if state.get("evaluation_due"):
            self._evaluation_due = state["generators"]
        if state["stream"] is not None and isinstance(self.train_dataset, StreamedBlocks):
            self.train_dataset.restore(state["stream"]["state"])
            self._stream_from = state["stream"]["step"]

    def _stream_state(self) -> dict[str, Any] | None:
        """Return where a stream of training data has come to: after what was trained, whatever was read ahead."""
        if not isinstance(self.train_dataset, StreamedBlocks):
            return None
        return {"step": self.state.global_step, "state": self.train_dataset.state_after(self._blocks_trained())}

    def _blocks_trained(self) -> int:
        """Return how many blocks of a stream were trained since this process began to read it."""
        steps: int = self.state.global_step - self._stream_from
        per_step: int = self.args.gradient_accumulation_steps * self.args.train_batch_size
        return steps * per_step

    def _load_scaler(self, checkpoint_path: str | None) -> None:
        """Nothing: the scaler came with the optimizer."""

    def _load_rng_state(self, checkpoint_path: str | None) -> None:
        """Restore what must be as it was right before the first resumed batch: generators, and the loss not yet logged."""
        if checkpoint_path is None:
            return
        state = checkpoint.load_tree(Path(checkpoint_path), "state")
        if self._generators_now is None:
            self._restore(state["generators"])
        else:
            checkpoint.restore_rng(self._generators_now)
        self._tr_loss += state["loss_since_log"].to(self._tr_loss.device)
        self._globalstep_last_logged = state["step_of_last_log"]
        if isinstance(self.train_dataset, StreamedBlocks):
            self._generators = checkpoint.rng_state()

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Return the batches of a step; a resumed stream's loader, just made, has drawn a number that it must not have."""
        if isinstance(self.train_dataset, StreamedBlocks):
            self.train_dataset.forget(self._blocks_trained())
        try:
            batches = super().get_batch_samples(*args, **kwargs)
        except DataError:
            if isinstance(self.train_dataset, StreamedBlocks) and self.state.global_step > self._stream_from:
                self._save_checkpoint(self.model, None)  # so that what was trained is not lost with the row that is wrong
            raise
        if self._generators is not None:
            checkpoint.restore_rng(self._generators)
            self._generators = None
        return batches


def _most_frugal(mode: Mode) -> Mode:
    """Return what the process with the least memory has chosen."""
    return max(gather_object([mode]), key=MODES.index)


@contextlib.contextmanager
def _not_called_quantized(model: torch.nn.Module) -> Iterator[None]:
    """Hide the mark by which the Trainer refuses "purely quantized models": it knows adapters of PEFT only.

    `inject_adapter` has checked what that refusal is for: something is trained, and nothing of the base.
    """
    marked = [module for module in model.modules() if vars(module).get("is_quantized")]
    for module in marked:
        module.is_quantized = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in marked:
            module.is_quantized = True  # type: ignore[assignment]
