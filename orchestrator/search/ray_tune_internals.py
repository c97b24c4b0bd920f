"""The names of Ray Tune that search/ overrides or relies on beyond its documentation; importing this module checks
them. docs/upgrading-ray.md says what each is for.
"""

from orchestrator.base.ray_internals import SUPPORTED_RAY, PrivateName, require

SCHEDULERS = "ray.tune.schedulers"
TRIAL_EVENT = ("self", "iteration", "trials", "trial", "**info")

INTERNALS = (
    PrivateName(SCHEDULERS, "TrialScheduler", (), ("_metric",)),
    PrivateName(
        SCHEDULERS,
        "PopulationBasedTraining",
        (
            "time_attr", "metric", "mode", "perturbation_interval", "burn_in_period", "hyperparam_mutations",
            "quantile_fraction", "resample_probability", "perturbation_factors", "custom_explore_fn", "log_config",
            "require_attrs", "synch",
        ),
        ("_trial_state",),
    ),
    PrivateName(
        SCHEDULERS, "PopulationBasedTraining._checkpoint_or_exploit",
        ("self", "trial", "tune_controller", "upper_quantile", "lower_quantile"),
    ),
    PrivateName(SCHEDULERS, "PopulationBasedTraining.on_trial_add", ("self", "tune_controller", "trial")),
    PrivateName(SCHEDULERS, "PopulationBasedTraining.on_trial_result", ("self", "tune_controller", "trial", "result")),
    PrivateName(
        f"{SCHEDULERS}.pbt", "_PBTTrialState", ("trial",),
        ("last_train_time", "last_perturbation_time", "last_score", "last_result"),
    ),
    PrivateName(
        SCHEDULERS,
        "AsyncHyperBandScheduler",
        (
            "time_attr", "metric", "mode", "max_t", "grace_period", "reduction_factor", "brackets", "stop_last_trials",
        ),
    ),
    PrivateName("ray.tune.search.search_algorithm", "SearchAlgorithm", (), ("_finished",)),
    PrivateName("ray.tune.search.search_algorithm", "SearchAlgorithm.set_finished", ("self",)),
    PrivateName(
        "ray.tune.experiment",
        "Trial",
        (
            "trainable_name", "config", "trial_id", "storage", "evaluated_params", "experiment_tag",
            "placement_group_factory", "stopping_criterion", "checkpoint_config", "export_formats", "restore_path",
            "trial_name_creator", "trial_dirname_creator", "log_to_file", "max_failures", "stub",
            "_setup_default_resource",
        ),
        ("run_metadata", "max_failures", "error_file", "trial_id"),
    ),
    PrivateName("ray.tune.experiment", "Trial.set_config", ("self", "config")),
    PrivateName(
        "ray.tune.execution.tune_controller", "TuneController.pause_trial", ("self", "trial", "should_checkpoint")
    ),
    PrivateName("ray.tune", "Callback.on_step_end", ("self", "iteration", "trials", "**info")),
    PrivateName("ray.tune", "Callback.on_trial_start", TRIAL_EVENT),
    PrivateName("ray.tune", "Callback.on_trial_recover", TRIAL_EVENT),
    PrivateName("ray.tune", "Callback.on_trial_error", TRIAL_EVENT),
)  # fmt: skip

require(SUPPORTED_RAY, INTERNALS)
