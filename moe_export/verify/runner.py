"""Verifies a bundle: runs every case on the engine and on its yardstick, judges, localises, reports."""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UsageError
from .coverage import Coverage
from .engine_runs import EngineRuns
from .expert_errors import ExpertErrors
from .golden import check_golden_target, save_golden
from .inputs import Case, make_cases
from .judge import JudgedRun, judge, judge_plain
from .localise import localise
from .result import CaseResult, ParityReport
from .route_agreement import agreement_findings
from .tolerance import Tolerances, default_tolerances
from .yardstick import Yardstick, find_yardstick

if TYPE_CHECKING:
    from ..progress import Progress
    from ..runtime.session import Session
    from ..trace import Reference, TracedRun
    from .plan_session import PlanSession
    from .simulate import SimulatedSession


def verify_bundle(
    bundle: Path | str,
    *,
    against: Reference | Path | str | None = None,
    trust: bool = False,
    force_routing: bool = False,
    tolerances: Mapping[str, float] | None = None,
    text: str | None = None,
    seed: int = 0,
    save_golden: Path | str | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
    simulate: bool = False,
) -> ParityReport:
    """Compare a bundle's engine with its source model, routing included.

    Args:
        bundle: the bundle's folder. against: a running reference, a source model's folder, a golden file
        (``.npz``), or None for the source
            that the manifest records.
        trust: skip the bundle's hash check (and nothing else). force_routing: run every case once more with
        the reference's routing replayed. Done anyway for low-precision
            engines, for those with quantised experts, and where a near tie flipped or routing is wrong.
        tolerances: limits by name in place of the dtype's defaults; see ``docs/parity.md``.
        text: replaces the default texts; needs a tokenizer in the bundle.
        seed: of the random inputs; case *i* uses ``seed + i``.
        save_golden: also write inputs and reference answers into this ``.npz`` file.
        threads: threads of the engine; None: all cores.
        progress: told about stages.
        simulate: run the lowered graph of a TensorRT target on the CPU in place of its engine. The report
            then says that it was simulated, and how often buckets of experts were too small. Of a bundle of
            several ranks, run the graphs of all as one, in this process.

    Returns: the report. A failed check does not raise; ``report.passed`` is False then.

    Raises:
        UsageError: an argument is wrong, there is nothing to verify against, or ``simulate`` was asked of a
            target that runs on the CPU by itself.
        EnvironmentLacksError: a plan without its GPU; or plugin nodes are simulated, and Triton is missing.
        BundleError: the bundle is damaged or does not load.
        SourceError: the source model cannot be loaded.
    """
    from ..progress import NullProgress

    if save_golden is not None:
        check_golden_target(Path(save_golden))
    started = time.perf_counter()
    with _open(bundle, simulate, trust, threads) as session:
        verification = _Verification(session, against, tolerances, text, seed, progress or NullProgress())
        if save_golden is not None and verification.yardstick.kind == "golden":
            raise UsageError(
                "a golden file is made from the source model (--against FOLDER), not from another"
            )
        return verification.run(bundle, force_routing, save_golden, started)


def _open(
    bundle: Path | str, simulate: bool, trust: bool, threads: int | None
) -> Session | SimulatedSession | PlanSession:
    """The engine, its simulation, or for a plan on its GPU both."""
    from ..bundle.reader import open_bundle, open_manifest
    from ..runtime.session import load
    from ..sms import GPU_TARGETS
    from .plan_session import PlanSession
    from .simulate import load_simulated

    if simulate:
        manifest = open_manifest(bundle)
        if manifest.expert_parallel is not None and manifest.target not in GPU_TARGETS:
            from .merged_session import MergedSession

            return MergedSession(open_bundle(bundle, trust=trust), threads=threads)
        return load_simulated(bundle, trust=trust, threads=threads)
    session = load(bundle, trust=trust, threads=threads)
    if session.manifest.target not in GPU_TARGETS:
        return session
    return PlanSession(session, load_simulated(bundle, trust=True, threads=threads))


class _Verification:
    """One verification of one loaded bundle."""

    def __init__(
        self,
        session: Session | SimulatedSession | PlanSession,
        against: Reference | Path | str | None,
        tolerances: Mapping[str, float] | None,
        text: str | None,
        seed: int,
        progress: Progress,
    ) -> None:
        self.manifest = session.manifest
        self.seed, self.progress = seed, progress
        from .simulate import SimulatedSession

        outputs = [t.name for t in self.manifest.io.outputs if t.role != "cache"]
        self.tolerances: Tolerances = default_tolerances(
            self.manifest.dtype, outputs, tolerances, self.manifest.quantization
        )
        self.session = session
        self.simulated = isinstance(session, SimulatedSession)
        """Then showing the routing changes nothing: there is one form of the engine."""
        self.engine = EngineRuns(session)
        self.yardstick: Yardstick = find_yardstick(against, self.manifest)
        self.cases, self.notes = self._cases(session, text)
        self.runs: list[JudgedRun] = []
        self.results: list[CaseResult] = []
        self.failed: list[CaseResult] = []
        self.coverage = Coverage(self.manifest)
        self.expert_errors = ExpertErrors(self.manifest)

    def _cases(
        self, session: Session | SimulatedSession | PlanSession, text: str | None
    ) -> tuple[list[Case], list[str]]:
        given = self.yardstick.cases(self.manifest)
        if given is not None:
            if text is not None:
                raise UsageError("a golden file brings its own inputs; a text cannot be given with it")
            return given
        encode = None
        tokenizer = session.tokenizer if self.manifest.text is not None else None
        if tokenizer is not None:

            def encode(text: str) -> Sequence[int]:
                return list(tokenizer.encode(text).ids)

        return make_cases(self.manifest, encode=encode, text=text, seed=self.seed)

    def run(
        self, bundle: Path | str, force_routing: bool, golden: Path | str | None, started: float
    ) -> ParityReport:
        references: list[TracedRun | None] = []
        with self.progress.stage("verify", len(self.cases)) as advance:
            for number, case in enumerate(self.cases):
                references.append(self._case(case, force_routing))
                if golden is None:
                    self.yardstick.forget(self.cases[number + 1 :])
                advance(1)
        if golden is not None:
            self._save(golden, references)
        findings = (
            *localise(self.runs, self.failed, self.tolerances),
            *self.coverage.findings(),
            *agreement_findings(self.results, self.tolerances),
            *self.expert_errors.findings(self.tolerances),
        )
        passed = bool(self.results) and all(r.passed for r in self.results) and not findings
        from ..bundle.tools import tool_versions
        from .merged_session import MergedSession
        from .plan_session import PlanSession
        from .simulate import SimulatedSession

        if isinstance(self.session, (SimulatedSession, PlanSession)):
            told = self.session.notes()
        else:
            told = [self.session.rank_note] if self.session.rank_note else []
        told = [*told, *([self.session.merged_note] if isinstance(self.session, MergedSession) else [])]
        return ParityReport(
            passed=passed,
            bundle=os.fspath(bundle),
            against=self.yardstick.kind,
            source=self.yardstick.name,
            source_hash=self.manifest.source.hash,
            task=self.manifest.task,
            target=self.manifest.target,
            dtype=self.manifest.dtype,
            quantization=self.manifest.quantization,
            seed=self.seed,
            force_routing=force_routing,
            tolerances=tuple(self.tolerances.limits.values()),
            cases=tuple(self.results),
            findings=findings,
            coverage=self.coverage.layers(),
            notes=(*told, *self.notes, *self.coverage.notes()),
            tools=tool_versions(),
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            seconds=time.perf_counter() - started,
            simulated=self.simulated,
        )

    def _case(self, case: Case, force_routing: bool) -> TracedRun | None:
        """Run and judge one case; returns the reference's run, or None when the reference could not run
        it."""
        began = time.perf_counter()
        try:
            reference = self.yardstick.run(case)
        except Exception as error:  # Whatever a source model raises on an input is the result of that case.
            self._error(case, "free", "reference failed", error, began)
            return None
        free = self._judged(case, "free", reference, began)
        if free is None or not self.manifest.moe_layers:
            return reference
        routing_failed = any(c.level.startswith(("moe.routing", "moe.weights")) for c in free.result.failures)
        if force_routing or not self.tolerances.exact_routing or free.tie_flipped or routing_failed:
            self._judged(case, "forced", reference, time.perf_counter())
        return reference

    def _judged(self, case: Case, mode: str, reference: TracedRun, began: float) -> JudgedRun | None:
        try:
            if mode == "forced":
                engine = self.engine.forced(case, reference.layers)
                plain = None
            else:
                engine = self.engine.traced(case)
                plain = None if self.simulated else self.engine.plain(case)
        except Exception as error:  # Whatever an engine raises on an input is the result of that case.
            self._error(case, mode, "engine failed", error, began)
            return None
        run = judge(
            case, mode, engine, reference, self.manifest, self.tolerances, time.perf_counter() - began
        )
        if plain is not None:
            run = judge_plain(run, plain, reference, self.manifest, self.tolerances)
        self.coverage.add(run)
        self.expert_errors.add(run)
        self.results.append(run.result)
        self.runs.append(run.light() if run.result.passed else run)
        return run

    def _error(self, case: Case, mode: str, who: str, error: Exception, began: float) -> None:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        result = CaseResult(
            name=case.name,
            mode=mode,
            tags=case.tags,
            description=case.description,
            passed=False,
            seconds=time.perf_counter() - began,
            inputs={k: tuple(int(d) for d in v.shape) for k, v in case.inputs.items()},
            seed=case.seed,
            chunks=case.chunks,
            error=f"{who}: {lines[0][:500]}",
        )
        self.results.append(result)
        self.failed.append(result)

    def _save(self, golden: Path | str, references: Sequence[TracedRun | None]) -> None:
        complete = [r for r in references if r is not None]
        if len(complete) != len(references):
            raise UsageError(
                "no golden file written: the reference failed on a case (run without --save-golden to see)"
            )
        save_golden(golden, self.manifest, self.cases, complete, self.seed, self.notes)
