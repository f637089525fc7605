"""`tiled_attention`: summarise, measure, predict, select, compute, audit."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ParamSpec

import torch
from torch import Tensor

from aat_hf.config import AATConfig
from aat_hf.geometry.lift import lift
from aat_hf.kernels import router
from aat_hf.kernels.coarse import coarse_attention, merge_attention
from aat_hf.kernels.dense import Extras, dense_attention, grouped_sdpa, kind_for_sdpa
from aat_hf.kernels.gather import gather_attention
from aat_hf.kernels.reference import reference_attention
from aat_hf.kernels.skip import skip_attention
from aat_hf.patterns import MassCells
from aat_hf.report.stages import Stages
from aat_hf.tiling.arguments import as_mask, check_inputs
from aat_hf.tiling.audit import Audit, audit_rows
from aat_hf.tiling.layout import held_out_rows
from aat_hf.tiling.masks import AttentionMask, IntervalMask
from aat_hf.tiling.measure import measure_rows
from aat_hf.tiling.plan import plan
from aat_hf.tiling.select import Scene
from aat_hf.tiling.summaries import TileSummaries, summaries_of
from aat_hf.tiling.tile_map import TileMap
from aat_hf.vulkan import profile

P = ParamSpec("P")
_DEFAULT = AATConfig()


@dataclass(frozen=True)
class TiledAttentionResult:
    """What `tiled_attention` computed.

    Attributes:
        output: (batch, heads, queries, value_dim), dtype of v.
        lse: (batch, heads, queries) log-sum-exp of what was computed, float32 or wider; None if not asked for.
        tile_map: the tiles; None when the call went to exact attention.
        audit: measured infidelity of held-out rows; None when not audited.
        path: "tiled", "skip" or "dense".
        reason: why the call was not tiled, else None.
        weights: (batch, heads, queries, keys) where asked for.
        estimated: (batch, heads) infidelity the selector expected; in "skip" mode the certified bound's mean.
        cells: the selector's masses as `patterns.classify` sees them, where asked for and in "tiled" mode.
        stages: milliseconds by stage.
    """

    output: Tensor
    lse: Tensor | None
    tile_map: TileMap | None = None
    audit: Audit | None = None
    path: str = "tiled"
    reason: str | None = None
    weights: Tensor | None = None
    estimated: Tensor | None = None
    cells: MassCells | None = None
    stages: dict[str, float] = field(default_factory=dict)


def _without_autocast(function: Callable[P, TiledAttentionResult]) -> Callable[P, TiledAttentionResult]:
    """Inside, dtypes are chosen one by one: what is accumulated in float32 must not be narrowed."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> TiledAttentionResult:
        q = args[0] if args else kwargs["q"]
        device = q.device.type if isinstance(q, Tensor) else "cpu"
        if not torch.is_autocast_enabled(device):
            return function(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return call


@_without_autocast
def tiled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    config: AATConfig | None = None,
    is_causal: bool = False,
    attn_mask: AttentionMask | Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    need_lse: bool = True,
    need_weights: bool = False,
    need_cells: bool = False,
    audit: bool = True,
) -> TiledAttentionResult:
    """Adaptive tiled attention.

    Args:
        q: (batch, heads, queries, head_dim).
        k: (batch, kv_heads, keys, head_dim); heads is a multiple of kv_heads, nothing is repeated.
        v: (batch, kv_heads, keys, value_dim).
        config: settings; default `AATConfig()`.
        is_causal: query i sees the keys j <= i + keys - queries (the last query sees the last key).
        attn_mask: an `AttentionMask`, a bool tensor (True = may attend) or an additive float tensor, broadcastable
            to (batch, heads, queries, keys).
        scale: factor of q k^T, default head_dim ** -0.5.
        softcap: c in c * tanh(score / c).
        sinks: (heads,) logits of a virtual key without a value.
        bias: additive (batch or 1, heads or 1, queries, keys); such calls go to exact attention.
        dropout: dropout of attention weights; such calls go to exact attention.
        need_lse, need_weights: whether the log-sum-exp and the (exact) weights are wanted.
        need_cells: whether `cells` are wanted.
        audit: whether to measure the realised infidelity.

    Raises:
        TypeError, ValueError: wrong types, dtypes, devices or shapes; the message names them.
    """
    config = config or _DEFAULT
    check_inputs(q, k, v)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k = lift(q, k, config.geometry, config.curvature)
    extras = Extras(softcap, sinks, bias, dropout)
    stages = Stages(q.device)
    kind = None if need_lse or need_weights else kind_for_sdpa(q, k, attn_mask, is_causal, extras)
    if kind is not None:
        reason = why_dense(q, k, config, extras)
        if reason is not None:  # what follows would be felt in a short call
            with stages("dense"):
                output = grouped_sdpa(q, k, v, None, scale, dropout, kind == "causal")
            return TiledAttentionResult(output, None, path="dense", reason=reason, stages=stages.milliseconds())
    mask, bias = as_mask(q, k, attn_mask, is_causal, bias)
    extras = extras._replace(bias=bias)
    if q.shape[2] == 1 and not need_weights and _decodes(q, k, v, mask, config, extras):
        decoded = _decode(q, k, v, mask, config, scale, extras, stages, audit)
        if decoded is not None:
            return decoded
    reason = why_dense(q, k, config, extras, need_weights)
    if reason is None and not all(_finite(x) for x in (q, k, v)):
        reason = "q, k or v has values that are not finite"
    tile_map = estimated = cells = None
    if reason is None:  # read several times: a strided view costs more than one copy
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    if reason is None and config.mode == "tiled":
        with stages("select"):
            # nothing else holds the scene, so that its rounded keys and moments are gone before the kernel runs
            tile_map, estimated, cells = plan(Scene.of(q, k, mask, scale, config, softcap, sinks), need_cells)
        if tile_map is None:
            reason = "the mask and the forced tiles leave nothing to drop"
        elif config.backend == "auto":
            reason = router.too_dense(float(tile_map.density.mean()), q)
    if reason is not None:
        with stages("dense"):
            output, lse, weights = dense_attention(q, k, v, mask, scale, extras, need_lse, need_weights)
        return TiledAttentionResult(output, lse, None, None, "dense", reason, weights, stages=stages.milliseconds())
    with stages("compute"):
        if tile_map is None:  # mode "skip": decided while computing
            output, lse, tile_map, bound = skip_attention(q, k, v, mask, config, scale, softcap)
            lse_kept, estimated = lse, bound.mean(-1)
        else:
            output, lse, lse_kept = _kept_attention(q, k, v, tile_map, mask, config, scale, softcap)
        if sinks is not None:
            sink = sinks.to(lse)[None, :, None].expand_as(lse)
            output, lse = merge_attention((output, lse), (torch.zeros_like(output), sink))
    measured = None
    if audit and config.audit_rows:
        with stages("audit"):
            measured = _audit(q, k, mask, lse_kept, config, scale, extras)
    return TiledAttentionResult(
        output, lse, tile_map, measured, config.mode, None, None, estimated, cells, stages.milliseconds()
    )


def why_dense(q: Tensor, k: Tensor, config: AATConfig, extras: Extras, need_weights: bool = False) -> str | None:
    """Why a call goes to exact attention, by settings and shapes alone, or None when it can be tiled."""
    if config.mode == "dense":
        return 'mode is "dense"'
    if config.tolerance == 0:
        return "tolerance is 0"
    if need_weights:
        return "attention weights are wanted"
    if extras.bias is not None:
        return "an additive bias is given"
    if extras.dropout > 0:
        return f"dropout is {extras.dropout}"
    if q.shape[2] == 1 < k.shape[2]:
        return "a single query"
    shortest = router.shortest(config, q.device, q.dtype, q.shape[3])
    if k.shape[2] < shortest:
        return f"{k.shape[2]} keys are fewer than min_length = {shortest}"
    if q.shape[2] < config.query_tile:
        return f"{q.shape[2]} queries are fewer than a query tile ({config.query_tile})"
    return None


def _decodes(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, config: AATConfig, extras: Extras) -> bool:
    """Whether a single query's tiles are selected: `aat_hf.kernels.cpu_decode` does it, without gradients."""
    shortest = max(router.decode_from(config), config.dense_prefix + 1)
    if k.shape[2] < shortest or config.mode == "dense" or config.tolerance == 0 or config.coarse:
        return False
    if q.device.type != "cpu" or q.dtype == torch.float64 or config.backend not in ("auto", "cpu"):
        return False
    if extras.bias is not None or extras.dropout > 0 or not isinstance(mask, IntervalMask):
        return False
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        return False
    row = torch.zeros(1, dtype=torch.long, device=q.device)
    return int(mask.counts(row, mask.keys).min()) >= shortest


def _decode(
    q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, config: AATConfig, scale: float, extras: Extras,
    stages: Stages, audit: bool,
) -> TiledAttentionResult | None:  # fmt: skip
    """Attention of a single query; None where `decode_attention` cannot or need not."""
    from aat_hf.kernels.cpu_decode import decode_attention  # numba, loaded when needed

    assert isinstance(mask, IntervalMask)
    with stages("compute"):
        summaries = _summaries(k, config)
        found = decode_attention(q, k, v, mask, config, scale, extras.softcap, extras.sinks, summaries)
    if found is None:
        return None
    measured = Audit(torch.zeros(1, dtype=torch.long), found.lost) if audit and found.measured else None
    return TiledAttentionResult(
        found.output, found.lse, found.tile_map, measured, "skip" if summaries is None else "tiled",
        estimated=found.lost[..., 0], stages=stages.milliseconds(),
    )  # fmt: skip


def _summaries(k: Tensor, config: AATConfig) -> TileSummaries | None:
    """Those of the tiles of k (batch, kv_heads, keys, head_dim); not where mode "skip" promises that all is scored."""
    return summaries_of(k) if config.mode == "tiled" else None


@torch.no_grad()
def _finite(x: Tensor) -> bool:
    return bool(torch.stack(torch.aminmax(x)).isfinite().all())


def _kept_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tile_map: TileMap,
    mask: AttentionMask,
    config: AATConfig,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention on the backend asked for: output, log-sum-exp, and the log-sum-exp of the exact tiles alone."""
    if config.backend == "reference":
        kept = tile_map.exact.repeat_interleave(tile_map.query_tile, 2)[:, :, : q.shape[2]]
        kept = kept.repeat_interleave(tile_map.key_tile, 3)[..., : k.shape[2]]
        allowed = kept & mask.rows(torch.arange(q.shape[2], device=q.device))
        output, lse, _ = reference_attention(q, k, v, allowed, scale, softcap)
    elif config.backend == "vulkan" or (config.backend == "auto" and profile.pays(q, k, v, tile_map)):
        from aat_hf.kernels.vulkan import vulkan_attention  # the device is opened when needed

        output, lse = vulkan_attention(q, k, v, tile_map, mask, scale, softcap)
    elif config.backend == "cpu" or (config.backend == "auto" and q.device.type == "cpu" and q.dtype != torch.float64):
        if config.coarse:
            from aat_hf.kernels.cpu_coarse import cpu_coarse_attention  # numba, loaded when needed

            return cpu_coarse_attention(q, k, v, tile_map, mask, scale, softcap)
        from aat_hf.kernels.cpu import cpu_attention

        output, lse = cpu_attention(q, k, v, tile_map, mask, scale, softcap)
    else:
        output, lse = gather_attention(q, k, v, tile_map, mask, scale, softcap)
    if not config.coarse:
        return output, lse, lse
    return *merge_attention((output, lse), coarse_attention(q, k, v, tile_map, scale, softcap)), lse


@torch.no_grad()
def _audit(
    q: Tensor,
    k: Tensor,
    mask: AttentionMask,
    lse_kept: Tensor,
    config: AATConfig,
    scale: float,
    extras: Extras,
) -> Audit:
    """Exact log-sum-exp of held-out random rows against the kernel's own."""
    rows = held_out_rows(q.shape[2], config, q.device)
    exact = measure_rows(q, k, mask, rows, config.key_tile, scale, extras.softcap, extras.sinks)
    lse_kept = lse_kept[:, :, rows]
    if extras.sinks is not None:
        lse_kept = torch.logaddexp(lse_kept, extras.sinks.to(lse_kept)[None, :, None])
    return audit_rows(lse_kept, exact.lse, rows)
