"""What the passes found and did: one row for every attention-shaped site."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from relax_passes.attention_site import AttentionSite


@dataclass(frozen=True)
class SiteReport:
    """One attention.  ``reason`` says why it was left alone; it is empty where it was rewritten."""

    layer: int
    name: str
    form: str
    variant: str
    mask: str
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    sm_scale: float
    dtype: str
    rewritten: bool
    reason: str
    rope: str = ""


@dataclass
class Report:
    """All sites in the order of the graph, which is the order of the cache's layers."""

    sites: list[SiteReport] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)

    @property
    def all_rewritten(self) -> bool:
        return bool(self.sites) and all(site.rewritten for site in self.sites)

    def extend(self, sites: Sequence[AttentionSite], *, rewritten: bool, why: str = "") -> None:
        """Add sites that were rewritten, or left alone: because of themselves, or because of
        ``why``.
        """
        for site in sites:
            reason = site.reason or ("" if rewritten else why)
            self.sites.append(_row(len(self.sites), site, rewritten and not site.reason, reason))
        if why:
            self.refusals.append(why)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, ready for ``json.dumps``."""
        return {"sites": [asdict(site) for site in self.sites], "refusals": list(self.refusals)}


def _row(layer: int, site: AttentionSite, rewritten: bool, reason: str) -> SiteReport:
    return SiteReport(
        layer=layer,
        name=site.name,
        form=site.form,
        variant=site.variant,
        mask=site.mask.describe(),
        num_qo_heads=site.num_qo_heads,
        num_kv_heads=site.num_kv_heads,
        head_dim=site.head_dim,
        sm_scale=site.scale,
        dtype=site.dtype,
        rewritten=rewritten,
        reason=reason,
        rope=site.rope,
    )
