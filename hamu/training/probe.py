"""What HAMU can know before a trial is run: the gradient pairs of its first steps, and which settings they rule out.

    pairs = probe_run(run, 4)           # no step is taken
    pairs.fires(config)                 # [True, False, ...]: would a trial with this configuration be stopped there?

A result can be unpickled and read without torch; `fires` and what else decides a step import it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from hamu.errors import ConfigError
from hamu.training.config import TrainConfig

if TYPE_CHECKING:
    import torch

    from hamu.methods.combine import Decision
    from hamu.methods.gram import Grams
    from hamu.training.loop import TrainingRun

N_PAIRS = 3
"""Pairs that a probe measures unless told otherwise."""

SLACK = 1e-3
"""Default slack of `fires`: the Grams of another device, of more processes or of other kernels differ by less."""


@dataclass(frozen=True, kw_only=True)
class ProbedPairs:
    """Gradient pairs of a run's next steps, all at its present weights; pair 0 is exactly that of the first of them.

    blocks: names of the parameter tensors. retain, forget, cross: the Grams of the gradients as the backward passes left them:
    ||g_r||^2, ||g_f||^2, <g_r, g_f>, shape (n_pairs, n_blocks), float64. loss_scale: factor of both gradients (float16 passes;
    else 1). clip: factors that take it out and clip g_r and g_f, as the probed run does, shape (n_pairs, 2). is_random: whether
    the passes drew random numbers (dropout), so that a trial's own first step has other gradients.

    Of the clipped gradients, shape (n_pairs,) each, in the probed run's mode (blocks or one block, its radius, its role):
    product: S. aggregate_bound, feasible_bound: the largest constraint ratio at which that stopping rule does not fire.
    block_bounds: what each block adds to feasible_bound, shape (n_pairs, n_blocks), or (n_pairs, 1) for one block.
    """

    blocks: tuple[str, ...]
    retain: np.ndarray
    forget: np.ndarray
    cross: np.ndarray
    loss_scale: float
    clip: np.ndarray
    product: np.ndarray
    aggregate_bound: np.ndarray
    feasible_bound: np.ndarray
    block_bounds: np.ndarray
    is_random: bool = False

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.cross)

    @property
    def retain_norm(self) -> np.ndarray:
        """||g_r|| after clipping, shape (n_pairs, n_blocks)."""
        return np.sqrt(self.retain) * self.clip[:, :1]

    @property
    def forget_norm(self) -> np.ndarray:
        """||g_f|| after clipping, shape (n_pairs, n_blocks)."""
        return np.sqrt(self.forget) * self.clip[:, 1:]

    @property
    def kappa(self) -> np.ndarray:
        """<g_r, g_f> after clipping, shape (n_pairs, n_blocks)."""
        return self.cross * self.clip.prod(axis=1, keepdims=True)

    @property
    def angle(self) -> np.ndarray:
        """Angle between g_r and g_f in radians, shape (n_pairs, n_blocks); nan where one of them is zero."""
        return _angle(self.retain, self.forget, self.cross)

    @property
    def whole_kappa(self) -> np.ndarray:
        """<g_r, g_f> of the whole model after clipping, shape (n_pairs,)."""
        return self.kappa.sum(axis=1)

    @property
    def whole_angle(self) -> np.ndarray:
        """Angle between the whole gradients in radians, shape (n_pairs,); nan where one of them is zero."""
        return self.angle_of(slice(None))

    def angle_of(self, blocks: slice | np.ndarray) -> np.ndarray:
        """Angle between the gradients of some blocks together, in radians, shape (n_pairs,); nan where one of them is zero."""
        return _angle(*(part[:, blocks].sum(axis=1) for part in (self.retain, self.forget, self.cross)))

    def fires(self, config: TrainConfig, *, slack: float = SLACK) -> list[bool]:
        """Whether a trial would be stopped at each pair: by its criterion, if it ends at that at once, or as infeasible.

        A trial with these data, this model and these batches that fires at pair 0 ends at its first step. A criterion that
        must fire several times in a row (`stopping_patience`) stops nothing here, since the steps in between are taken. Where
        the passes are random nothing is known for sure: no pair fires.

        Args:
            config: hamu-q or hamu-u, with any ratio, rule, softness, radius, split and mode.
            slack: relative: a pair that fires by less than this share of the constraint counts as one that does not. 0 is exact
                for a run on the same device in one process.

        Raises:
            ConfigError: the method has no constraint.
        """
        from hamu.training.ends import is_firing

        is_at_once = config.method.stop_on_stopping_criterion and config.method.stopping_patience == 1
        constraint = config.constraint_of(self.product_of(config) if config.method.relative_constraint else None)

        def is_stopped(pair: int, constraint: float) -> bool:
            decision = self._decide(pair, config, constraint)
            fires = is_at_once and is_firing(decision.hardness, config=config, lr=config.lr)
            return fires or decision.stop_reason == "infeasible"

        if self.is_random:
            return [False] * len(self)
        # Both: under the rule "predicted" a smaller constraint may fire where the whole one does not.
        least = constraint * (1 - slack)
        return [is_stopped(pair, constraint) and is_stopped(pair, least) for pair in range(len(self))]

    def product_of(self, config: TrainConfig) -> float:
        """S of pair 0 in a configuration's mode: what its `relative_constraint` multiplies."""
        return self._decide(0, config, 0.0).hardness.gradient_product

    def largest_ratio(self, config: TrainConfig) -> list[float]:
        """Largest constraint ratio, not relative to S, at which a trial with these settings is not stopped at each pair.

        inf where nothing stops it. The rule "predicted" has no bound of this form: infeasibility alone counts then.

        Raises:
            ConfigError: the method has no constraint.
        """
        settings, found = config.method, []
        for pair in range(len(self)):
            hardness = self._decide(pair, config, config.lr).hardness  # the bounds are those of any constraint above 0
            bounds = [float("inf")]
            if config.on_infeasible == "stop":
                bounds.append(hardness.split_constraint_ratio)
            if settings.stop_on_stopping_criterion and settings.stopping_rule != "predicted":
                is_aggregate = settings.stopping_rule == "aggregate"
                bound = hardness.stopping_rhs / config.lr if is_aggregate else hardness.max_constraint_ratio
                bounds.append((1 - settings.stopping_softness) * bound)
            found.append(min(bounds))
        return found

    def _decide(self, pair: int, config: TrainConfig, constraint: float) -> Decision:
        """What a trial's step would be at a pair, with a constraint in nats."""
        from hamu.methods.catalog import find_method
        from hamu.methods.combine import decide_step
        from hamu.methods.gram import Grams
        from hamu.training.schedule import rules_at

        if not config.is_hamu:
            raise ConfigError(f"method {config.method_name!r} has no constraint to probe; give hamu-q or hamu-u")
        grams = Grams(retain=self.retain[pair], forget=self.forget[pair], cross=self.cross[pair])
        clip = _clip(grams, config, self.loss_scale)
        rules = replace(rules_at(config, config.lr), constraint=constraint)
        return decide_step(find_method(config.method_name), grams, lr=config.lr, rules=rules, clip=clip)


def probe_run(run: TrainingRun, n_pairs: int) -> ProbedPairs:
    """Measure the pairs of gradients of a run's next steps at its present weights; no step is taken.

    The weights, the random state and BatchNorm's statistics are left as they are. Of a run in several processes all call it.

    Args:
        run: of hamu-q or hamu-u; the other of the two, and any other of their settings, has the same gradients.
        n_pairs: >= 1; a run with fewer steps gives as many as it has.

    Raises:
        ConfigError: the run's method has no constraint, or `n_pairs` is below 1.
    """
    import torch

    from hamu.training.run_state import left_as_it_is

    if n_pairs < 1:
        raise ConfigError(f"n_pairs must be at least 1, got {n_pairs}")
    if not run.method.is_constrained:
        raise ConfigError(f"method {run.method.name!r} has no constraint to probe; give hamu-q or hamu-u")
    grams = []
    with left_as_it_is(run.model):
        run.engine.set_training_mode()
        before = _generator_state(run.engine.layout.device)
        for step in range(run.step, min(run.step + n_pairs, run.total_steps)):
            run.engine.gradients(*run.batches(step))
            grams.append(run.engine.read().grams)
        is_random = not torch.equal(before, _generator_state(run.engine.layout.device))
    loss_scale = run.engine.loss_scale
    names = tuple(name for name, param in run.model.named_parameters() if param.requires_grad)
    none = np.zeros(0)
    raw = ProbedPairs(
        blocks=names,
        retain=np.stack([pair.retain for pair in grams]),
        forget=np.stack([pair.forget for pair in grams]),
        cross=np.stack([pair.cross for pair in grams]),
        loss_scale=loss_scale,
        clip=np.array([_clip(pair, run.config, loss_scale) for pair in grams]),
        product=none,
        aggregate_bound=none,
        feasible_bound=none,
        block_bounds=none,
    )
    found = [raw._decide(pair, run.config, 0.0).hardness for pair in range(len(raw))]
    return replace(
        raw,
        product=np.array([hardness.gradient_product for hardness in found]),
        aggregate_bound=np.array([hardness.stopping_rhs / run.config.lr for hardness in found]),
        feasible_bound=np.array([hardness.max_constraint_ratio for hardness in found]),
        block_bounds=np.stack([hardness.block_ratios for hardness in found]),
        is_random=is_random,
    )


def _generator_state(device: torch.device) -> torch.Tensor:
    """State of the generators that passes on a device draw from."""
    import torch

    host = torch.get_rng_state()
    return torch.cat([host, torch.cuda.get_rng_state(device)]) if device.type == "cuda" else host


def _clip(grams: Grams, config: TrainConfig, loss_scale: float) -> tuple[float, float]:
    """Factors that unscale and clip g_r and g_f, as `PairedEngine.decide` finds them."""
    from hamu.methods.gram import unscaled_clip

    return unscaled_clip(grams, config.training.max_grad_norm, loss_scale)


def _angle(retain: np.ndarray, forget: np.ndarray, cross: np.ndarray) -> np.ndarray:
    product = retain * forget
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.arctan2(np.sqrt(np.maximum(product - cross**2, 0.0)) / np.sqrt(product), cross / np.sqrt(product))
