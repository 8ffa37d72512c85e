"""What `--mode=plan` prints."""

from nag_jax.jobs.plan_text import duration_text, size_text, table

MEMORY = {"arguments": 2**30, "outputs": 0, "temporaries": 2**31, "code": 0, "peak": 5 * 2**29, "total": 3 * 2**30}
PROGRAM = {
    "fits": True,
    "batch_size": 8,
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


def test_a_plan_that_does_not_fit_says_what_would():
    failed = {"fits": False, "batch_size": 64, "needed_bytes": 2**35, "flops": 1.0, "remat": "none", "state_bytes": 1}
    settings = {"data": 1, "fsdp": 4, "tensor": 1, "remat": "full", "batch_size": 8}
    largest = {"fits": 0, "too_large": 4, "compilations": 6}
    text = table(PLAN | {"training": failed, "suggestion": PROGRAM | settings, "largest_batch": largest})
    assert "it would need 32.00 GiB" in text and "none; 4 is too large" in text
    assert "--config.parallel.fsdp=4" in text and "--config.model.remat=full --config.batch_size=8" in text
    assert "Nothing that was tried fits" in table(PLAN | {"training": failed})
    assert "more than a device has" not in text
    assert "32.00 GiB, more than a device has" in table(PLAN | {"training": failed | {"state_bytes": 2**35}})
    assert "not estimated" in text  # the suggestion comes without a roofline here


def test_sampling_that_does_not_fit_says_what_to_set():
    failed = {"fits": False, "needed_bytes": 2**35, "flops": 1.0}
    sampling = failed | {"batch_size": 64, "num_steps": 50, "stepper": "euler", "method": "cfg"}
    assert "parallel.fsdp" in table(PLAN | {"sampling": sampling}) and "parallel.fsdp" not in table(PLAN)
