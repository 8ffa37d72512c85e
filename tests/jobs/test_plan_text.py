"""What `--mode=plan` prints."""

from nag_jax.jobs.plan_text import duration_text, size_text, table

MEMORY = {"arguments": 2**30, "outputs": 0, "temporaries": 2**31, "code": 0, "peak": 5 * 2**29, "total": 3 * 2**30}
PROGRAM = {
    "fits": True,
    "batch_size": 8,
    "images": 8,
    "needed_bytes": 5 * 2**29,
    "flops": 2e12,
    "memory": MEMORY,
    "collectives": {"all-reduce": {"count": 2, "bytes": 2**20, "received": 2**21}},
}
ROOFLINE = {
    "compute_seconds": 0.5,
    "memory_seconds": 0.1,
    "communication_seconds": 0.25,
    "seconds": 0.5,
    "seconds_without_overlap": 0.75,
    "communication_share": [0.0, 1 / 3],
}
PLAN = {
    "topology": "v5e:2x2",
    "devices": 4,
    "device_kind": "TPU v5 lite",
    "memory_limit": 16 * 2**30,
    "mesh": {"data": 1, "fsdp": 4, "tensor": 1},
    "training": PROGRAM | {"remat": "dots", "num_steps": 72_000, "state_bytes": 2**29, "roofline": ROOFLINE},
    "largest_batch": {"fits": 32, "too_large": 36, "compilations": 4},
    "suggestion": None,
    "sampling": None,
}


def test_sizes_and_durations_have_a_unit_that_suits_them():
    sizes = [size_text(size) for size in (12, 2**11, 3 * 2**20, 5 * 2**30)]
    assert sizes == ["12 B", "2.00 KiB", "3.00 MiB", "5.00 GiB"]
    durations = [duration_text(duration) for duration in (9000.0, 90.0, 2.5, 0.02, 3e-5)]
    assert durations == ["2.5 h", "1.5 min", "2.5 s", "20 ms", "30 us"]


def test_a_plan_that_fits():
    text = table(PLAN)
    for part in (
        "v5e:2x2: TPU v5 lite x4 (data 1 x fsdp 4 x tensor 1), memory of each 16.00 GiB",
        "2.50 GiB at once (arguments 1.00 GiB, temporaries 2.00 GiB",
        "2 times, 1.00 MiB in all, 2.00 MiB to each device",
        "500 ms to 750 ms",
        "all 72,000 steps      10 h to 15 h",
        "16 at best",
        "0% where it hides behind the rest, 33% where it does not",
        "32 fits, 36 does not",
        "estimates",
    ):
        assert part in text, part
    assert "What fits" not in text


def test_a_program_of_several_steps_takes_so_many_times_as_long_as_one():
    several = PLAN["training"] | {"images": 4 * 8}
    text = table(PLAN | {"training": several})
    assert "training, batch 8, remat dots, 4 steps in a program" in text
    assert "images a second       64 at best" in text
    assert "all 72,000 steps      2.5 h to 3.75 h" in text


def test_a_plan_that_does_not_fit_says_what_would():
    failed = {"fits": False, "batch_size": 64, "images": 64, "needed_bytes": 2**35, "flops": 1.0}
    failed |= {"remat": "none", "state_bytes": 1}
    settings = {"data": 1, "fsdp": 4, "tensor": 1, "remat": "full", "batch_size": 8}
    largest = {"fits": 0, "too_large": 4, "compilations": 6}
    text = table(PLAN | {"training": failed, "suggestion": PROGRAM | settings, "largest_batch": largest})
    assert "it would need 32.00 GiB" in text and "none; 4 is too large" in text
    assert "not estimated" in text  # the suggestion comes without a roofline here
    assert "--config.parallel.fsdp=4" in text and "--config.model.remat=full --config.batch_size=8" in text
    assert "Nothing smaller was tried. Choose more devices" in table(PLAN | {"training": failed})
    smallest = failed | settings | {"batch_size": 4}
    text = table(PLAN | {"training": failed, "suggestion": smallest, "largest_batch": largest})
    assert "smallest that was tried does not fit: --config.parallel.data=1 --config.parallel.fsdp=4" in text
    assert "--config.batch_size=4\n" in text and "Choose more devices" in text and "What fits" not in text
    assert "more than a device has" not in text
    assert "32.00 GiB, more than a device has" in table(PLAN | {"training": failed | {"state_bytes": 2**35}})


def test_a_sampler_that_does_not_fit_says_what_would():
    mesh = {"data": 4, "fsdp": 1, "tensor": 1}
    failed = {"fits": False, "images": 64, "batch_size": 64, "needed_bytes": 2**35, "flops": 1.0}
    asked = failed | {"num_steps": 3, "stepper": "euler", "method": "plain"}
    suggestions = [PROGRAM | mesh | {"batch_size": 16}, PROGRAM | mesh | {"data": 1, "fsdp": 4, "batch_size": 64}]
    text = table(PLAN | {"sampling": asked | {"suggestions": suggestions}})
    flags = "--config.parallel.data={} --config.parallel.fsdp={} --config.parallel.tensor=1"
    assert f"What fits: {flags.format(4, 1)} --config.sampling.batch_size=16\n" in text
    assert f"Or: {flags.format(1, 4)} --config.sampling.batch_size=64\n" in text
    text = table(PLAN | {"sampling": asked | {"suggestions": [suggestions[0], failed | mesh | {"batch_size": 8}]}})
    assert "batch_size=16\n" in text and "batch_size=8\n" not in text
    text = table(PLAN | {"sampling": asked | {"suggestions": [failed | mesh | {"batch_size": 8}]}})
    assert f"The smallest that was tried does not fit: {flags.format(4, 1)} --config.sampling.batch_size=8\n" in text
