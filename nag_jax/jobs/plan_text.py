"""A plan in words: the lines that `--mode=plan` prints, of the content of its plan.json. Nothing is computed here."""

from __future__ import annotations

from typing import Any

from nag_jax.plan.topologies import GIB


def table(plan: dict[str, Any]) -> str:
    """The lines of a plan.

    Args:
        plan: content of plan.json.
    """
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan["mesh"].items())
    limit = "not known" if plan["memory_limit"] is None else size_text(plan["memory_limit"])
    training, sampling = plan["training"], plan["sampling"]
    together = training["images"] // training["batch_size"]
    several = f", {together} steps in a program" if together > 1 else ""
    too_much = plan["memory_limit"] is not None and training["state_bytes"] > plan["memory_limit"]
    lines = [
        f"{plan['topology']}: {plan['device_kind']} x{plan['devices']} ({mesh}), memory of each {limit}",
        "",
        f"training, batch {training['batch_size']}, remat {training['remat']}{several}",
        *program_lines(training),
        f"  {'state alone':<22}{size_text(training['state_bytes'])}{', more than a device has' if too_much else ''}",
    ]
    if (line := training.get("roofline")) is not None:
        steps = training["num_steps"]
        hidden, bare = (duration_text(steps / together * line[key]) for key in ("seconds", "seconds_without_overlap"))
        lines.append(f"  {f'all {steps:,} steps':<22}{hidden} to {bare}")
    if (largest := plan["largest_batch"]) is not None:
        lines.append(f"  {'largest batch':<22}{largest_words(largest)}")
    if not training["fits"]:
        tried = [plan["suggestion"]] if plan["suggestion"] is not None else []
        lines += ["", *suggestion_lines(tried, "batch_size", ("model.remat",))]
    if sampling is not None:
        lines += [
            "",
            f"sampling, batch {sampling['batch_size']}, {sampling['num_steps']} steps of {sampling['stepper']}, "
            f"{sampling['method']}",
            *program_lines(sampling),
        ]
        if not sampling["fits"]:
            lines += ["", *suggestion_lines(sampling["suggestions"], "sampling.batch_size")]
    lines += ["", "Times are roofline estimates: peak products, full bandwidth. A real run is slower."]
    return "\n".join(lines)


def program_lines(program: dict[str, Any]) -> list[str]:
    """Memory, collectives and times of one program, indented."""
    needed = program["needed_bytes"]
    if "memory" not in program:
        size = "more than there is" if needed is None else size_text(needed)
        return [f"  {'does not fit':<22}it would need {size}"]
    memory = program["memory"]
    parts = ", ".join(f"{name} {size_text(memory[name])}" for name in ("arguments", "temporaries", "outputs", "code"))
    verdict = "" if program["fits"] else ": does not fit"
    how = "at once" if needed == memory["peak"] else "together"
    lines = [
        f"  {'memory of a device':<22}{size_text(needed)} {how} ({parts}){verdict}",
        f"  {'operations':<22}{program['flops'] / 1e12:.4g} TFLOP, of all devices together",
    ]
    for kind, sums in program["collectives"].items():
        received = size_text(sums["received"])
        lines.append(f"  {kind:<22}{sums['count']} times, {size_text(sums['bytes'])} in all, {received} to each device")
    if not program["collectives"]:
        lines.append(f"  {'collectives':<22}none")
    if (line := program.get("roofline")) is None:
        return [*lines, f"  {'time':<22}not estimated: this device's speed is not in the table of chips"]
    least, most = line["communication_share"]
    resources = ("compute", "memory", "communication")
    each = ", ".join(f"{part} {duration_text(line[f'{part}_seconds'])}" for part in resources)
    hidden, bare = duration_text(line["seconds"]), duration_text(line["seconds_without_overlap"])
    return [
        *lines,
        f"  {'time, estimated':<22}{hidden} to {bare}: {each}",
        f"  {'images a second':<22}{program['images'] / line['seconds']:.4g} at best",
        f"  {'lost to communication':<22}{least:.0%} where it hides behind the rest, {most:.0%} where it does not",
    ]


def largest_words(largest: dict[str, Any]) -> str:
    """The outcome of the search of a batch."""
    if not largest["fits"]:
        return f"none; {largest['too_large']} is too large"
    if largest["too_large"] is None:
        return f"{largest['fits']} fits, and larger ones may"
    return f"{largest['fits']} fits, {largest['too_large']} does not"


def suggestion_lines(tried: list[dict[str, Any]], batch_key: str, keys: tuple[str, ...] = ()) -> list[str]:
    """What to set where the config does not fit.

    Args:
        tried: settings with the reports of their programs; where some fit, the others are left out.
        batch_key: the config's key of "batch_size".
        keys: keys to set besides the mesh and the batch.
    """
    if not tried:
        return ["Nothing smaller was tried. Choose more devices, or a smaller network."]
    lines: list[str] = []
    for each in [one for one in tried if one["fits"]] or tried[-1:]:
        names = ("parallel.data", "parallel.fsdp", "parallel.tensor", *keys)
        flags = [f"--config.{name}={each[name.partition('.')[2]]}" for name in names]
        setting = " ".join([*flags, f"--config.{batch_key}={each['batch_size']}"])
        if not each["fits"]:
            lines.append(f"The smallest that was tried does not fit: {setting}")
            lines += [*program_lines(each), "Choose more devices, or a smaller network."]
        else:
            lines += [f"{'Or' if lines else 'What fits'}: {setting}", *program_lines(each)]
    return lines


def size_text(num_bytes: float) -> str:
    """Bytes in a unit that suits them."""
    for unit, size in (("GiB", GIB), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= size:
            return f"{num_bytes / size:.2f} {unit}"
    return f"{num_bytes:.0f} B"


def duration_text(duration: float) -> str:
    """A duration in a unit that suits it."""
    for unit, size in (("h", 3600.0), ("min", 60.0), ("s", 1.0), ("ms", 1e-3)):
        if duration >= size:
            return f"{duration / size:.3g} {unit}"
    return f"{duration / 1e-6:.3g} us"
