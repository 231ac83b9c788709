"""Is a store whole? Everything that can be told without reading the latents."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from latentvae.errors import UserError
from latentvae.files import TEMPORARY_MARK, sha256_file
from latentvae.latents.fingerprint import differences, fingerprint
from latentvae.latents.plan import Plan, Unit, plan_files, read_plan
from latentvae.latents.records import DTYPES, TENSORS, CommitRecord, Counts, Manifest, merge_sums
from latentvae.latents.store import LatentStore, file_record, is_sealed, open_shard, read_index


@dataclass(frozen=True)
class VerifyReport:
    """`problems` is empty where the store is whole; each is one line that names the file or the unit."""

    store: Path
    units: int
    counts: Counts
    problems: list[str] = field(default_factory=list)

    @property
    def is_whole(self) -> bool:
        """No problem was found."""
        return not self.problems

    def __str__(self) -> str:
        state = "whole" if self.is_whole else f"{len(self.problems)} problems"
        head = (
            f"{self.store}: {state}; {self.units} units, {self.counts.inputs} inputs: {self.counts.ok} with latents, "
            f"{self.counts.error} errors, {self.counts.skipped} skipped"
        )
        return "\n".join([head, *self.problems])


def verify_store(store: str | Path) -> VerifyReport:
    """Check plan, records, sizes, headers, and that every planned key is in exactly one row. Changes nothing.

    The bytes of the latents themselves are not read. Raises UserError only where the folder is no store at all.
    """
    layout = LatentStore(store)
    manifest = layout.read_manifest()
    problems: list[str] = []
    if fingerprint(manifest.fields) != manifest.fingerprint:
        problems.append("manifest.json: its fingerprint does not belong to its fields")
    if not is_sealed(layout.manifest_path):
        problems.append("manifest.json: its bytes are not those that were written")
    found_plan = {path.name: file_record(path) for path in plan_files(layout.plan_folder)}
    for name in sorted(found_plan.keys() | manifest.plan.keys()):
        if found_plan.get(name) != manifest.plan.get(name):
            problems.append(f"plan/{name}: it is not the file that the manifest names")
    try:
        plan = read_plan(layout.plan_folder)
    except UserError as error:
        problems.append(str(error))
        plan = Plan()
    records: list[CommitRecord] = []
    for unit in plan.units:
        try:
            found = layout.read_record(unit.bucket, unit.number)
        except UserError as error:
            problems.append(str(error))
            continue
        if found is None:
            problems.append(f"unit {unit.number}: not encoded yet (run encode again)")
            continue
        records.append(found)
        problems += _unit_problems(layout, manifest, unit, found)

    counts = sum((record.counts for record in records), Counts())
    if manifest.complete and len(records) == len(plan.units):
        if manifest.totals != counts:
            problems.append("manifest.json: its totals are not the sums of the commit records")
        if records and manifest.statistics != merge_sums([record.channels for record in records]):
            problems.append("manifest.json: its statistics are not those of the commit records")
    elif not manifest.complete:
        problems.append("manifest.json: the store is not complete (run encode again)")
    problems += _extra_files(layout, plan)
    return VerifyReport(layout.folder, len(records), counts, problems)


def _unit_problems(layout: LatentStore, manifest: Manifest, unit: Unit, record: CommitRecord) -> Iterator[str]:
    """What is wrong with one committed unit."""
    data, index, path = layout.paths(unit.bucket, unit.number)

    def name(file: Path) -> str:
        return file.relative_to(layout.folder).as_posix()

    if (record.unit, record.bucket) != (unit.number, unit.bucket):
        yield f"{name(path)}: it is the record of unit {record.unit} in {record.bucket}"
    if not is_sealed(path):
        yield f"{name(path)}: its bytes are not those that were written"
    for phrase in differences(record.fields, manifest.fields):
        yield f"{name(path)}: made with other settings: {phrase}"
    if record.fingerprint != fingerprint(record.fields):
        yield f"{name(path)}: its fingerprint does not belong to its fields"
    if set(record.files) != {data.name, index.name}:
        yield f"{name(path)}: it names the files {sorted(record.files)}"
        return
    intact = True
    for file in (data, index):
        expected = record.files[file.name].num_bytes
        if not file.exists():
            intact = False
            yield f"{name(file)}: missing"
        elif file.stat().st_size != expected:
            intact = False
            yield f"{name(file)}: {file.stat().st_size} bytes, {expected} were committed"
    if not intact:
        return
    yield from _shard_problems(layout, manifest, unit, record)
    if sha256_file(index) != record.files[index.name].sha256:
        yield f"{name(index)}: its bytes are not those that were committed"
    yield from _index_problems(layout, unit, record)


def _shard_problems(layout: LatentStore, manifest: Manifest, unit: Unit, record: CommitRecord) -> Iterator[str]:
    data = layout.paths(unit.bucket, unit.number)[0]
    name = data.relative_to(layout.folder).as_posix()
    try:
        shard = open_shard(data)
    except UserError as error:
        yield str(error)
        return
    if (shard.fingerprint, shard.unit) != (manifest.fingerprint, unit.number):
        yield f"{name}: its header belongs to another store or unit"
    bucket = next((bucket for bucket in manifest.buckets if bucket.name == unit.bucket), None)
    if bucket is None:
        yield f"{name}: the manifest has no bucket {unit.bucket}"
        return
    shape = (record.counts.ok, manifest.latent_channels, bucket.latent_height, bucket.latent_width)
    if set(shard.tensors) != set(TENSORS[manifest.store]):
        yield f"{name}: it holds {sorted(shard.tensors)}, not {list(TENSORS[manifest.store])}"
    for tensor_name, tensor in shard.tensors.items():
        if tuple(tensor.shape) != shape or tensor.dtype != DTYPES[manifest.dtype]:
            found = f"{tuple(tensor.shape)} {tensor.dtype}"
            yield f"{name}: {tensor_name} is {found}, {shape} {manifest.dtype} was committed"


def _index_problems(layout: LatentStore, unit: Unit, record: CommitRecord) -> Iterator[str]:
    index = layout.paths(unit.bucket, unit.number)[1]
    name = index.relative_to(layout.folder).as_posix()
    try:
        rows = read_index(index).to_pylist()
    except UserError as error:
        yield str(error)
        return
    if [row["key"] for row in rows] != [image.key for image in unit.images]:
        yield f"{name}: its keys are not those of the plan, once each and in order"
    places = [row["row"] for row in rows if row["status"] == "ok"]
    if places != list(range(record.counts.ok)):
        yield f"{name}: its rows with latents are not 0 to {record.counts.ok - 1}, once each"
    failed = [row for row in rows if row["status"] != "ok"]
    if any(row["row"] != -1 or not row["error"] for row in failed):
        yield f"{name}: a row without latents has a place in the shard, or no reason"
    numbers = [sum(row["status"] == status for row in rows) for status in ("ok", "error", "skipped")]
    if [*numbers, len(rows)] != [record.counts.ok, record.counts.error, record.counts.skipped, record.counts.inputs]:
        yield f"{name}: its rows are not the counts of the commit record"


def _extra_files(layout: LatentStore, plan: Plan) -> Iterator[str]:
    """Files that no unit owns."""
    expected = {layout.manifest_path, *layout.plan_folder.glob("plan-*.parquet")}
    for unit in plan.units:
        expected.update(layout.paths(unit.bucket, unit.number))
    for path in sorted(layout.folder.rglob("*")):
        if path in expected or path.is_dir():
            continue
        name = path.relative_to(layout.folder).as_posix()
        if path.name.startswith(layout.lock_path.name):
            yield f"{name}: an encode is running, or was killed (run it again)"
        elif TEMPORARY_MARK in path.name:
            yield f"{name}: left by an encode that was killed (the next one removes it)"
        else:
            yield f"{name}: not a file of this store"
