"""The private names of Ray Train that ray_train.py relies on; importing this module checks them.

A name that ray_train.py calls, overrides or is called with is listed with its parameters. docs/upgrading-ray.md says
what each is for.
"""

from orchestrator.base.ray_internals import SUPPORTED_RAY, PrivateName, require

V2 = "ray.train.v2._internal"
CONTROLLER = f"{V2}.execution.controller"
GROUP = f"{V2}.execution.worker_group"

INTERNALS = (
    # the trainer, whose controller runs in this process
    PrivateName("ray.train.torch", "TorchTrainer._create_default_callbacks", ("self",)),
    PrivateName(
        "ray.train.torch", "TorchTrainer._initialize_and_run_controller", ("self", "**controller_init_kwargs")
    ),
    PrivateName(f"{V2}.callbacks.datasets", "DatasetsCallback"),
    PrivateName(f"{V2}.callbacks.placement_group_callback", "PlacementGroupCleanerCallback"),
    PrivateName(f"{V2}.constants", "get_env_vars_to_propagate", ()),
    PrivateName(f"{V2}.constants", "ENABLE_CONTROLLER_STRUCTURED_LOGGING_ENV_VAR"),
    # the controller
    PrivateName(
        CONTROLLER,
        "TrainController",
        (
            "train_fn_ref", "train_run_context", "scaling_policy", "failure_policy", "callbacks", "validation_config",
        ),
        ("worker_group_cls", "_checkpoint_manager", "_worker_group"),
    ),
    PrivateName(CONTROLLER, "TrainController.run", ("self",)),
    PrivateName(CONTROLLER, "TrainController.get_result", ("self",)),
    PrivateName(CONTROLLER, "TrainController.get_state", ("self",)),
    PrivateName(CONTROLLER, "TrainController._run_control_loop_iteration", ("self",)),
    PrivateName(CONTROLLER, "TrainController._start_worker_group", ("self", "num_workers", "resources_per_worker")),
    PrivateName(CONTROLLER, "TrainController._shutdown_worker_group", ("self",)),
    PrivateName(f"{CONTROLLER}.state", "ShuttingDownState", ("next_state",), ("next_state",)),
    PrivateName(f"{CONTROLLER}.state", "FinishedState", ()),
    PrivateName(
        f"{V2}.execution.checkpoint.checkpoint_manager", "CheckpointManager", ("checkpoint_config", "storage_context"),
        ("_checkpoint_results",),
    ),
    # the group of workers
    PrivateName(
        f"{GROUP}.worker_group",
        "WorkerGroup",
        ("train_run_context", "worker_group_context", "callbacks"),
        ("_train_run_context", "_storage_context", "_worker_callbacks_to_propagate", "_worker_group_state"),
    ),
    PrivateName(
        f"{GROUP}.worker_group", "WorkerGroup.create", ("train_run_context", "worker_group_context", "callbacks")
    ),
    PrivateName(f"{GROUP}.worker_group", "WorkerGroup._start", ("self",)),
    PrivateName(
        f"{GROUP}.worker_group",
        "WorkerGroup._create_placement_group",
        ("self", "scaling_config", "worker_group_context"),
    ),
    PrivateName(
        f"{GROUP}.worker_group",
        "WorkerGroup._create_workers",
        (
            "self", "num_workers", "placement_group", "resources_per_worker", "placement_group_bundle_indices",
            "starting_world_rank", "world_size", "replica_group_size",
        ),
    ),
    PrivateName(
        f"{GROUP}.worker_group",
        "WorkerGroup._init_train_context_on_workers",
        ("self", "workers", "sync_actor", "train_context_args"),
    ),
    PrivateName(
        f"{GROUP}.worker_group",
        "WorkerGroup._assign_worker_ranks",
        ("workers", "starting_world_rank", "world_size", "replica_group_size"),
    ),
    PrivateName(f"{GROUP}.worker_group", "WorkerGroup._decorate_worker_log_file_paths", ("workers",)),
    PrivateName(f"{GROUP}.worker_group", "WorkerGroup.execute", ("self", "fn", "*fn_args", "**fn_kwargs")),
    PrivateName(f"{GROUP}.worker_group", "WorkerGroup.shutdown", ("self",)),
    PrivateName(f"{GROUP}.worker_group", "WorkerGroup.abort", ("self",)),
    PrivateName(f"{GROUP}.worker_group", "WorkerGroup.has_started", ("self",)),
    PrivateName(
        f"{GROUP}.state", "WorkerGroupState", ("start_time", "placement_group_handle", "workers", "sync_actor")
    ),
    PrivateName(f"{GROUP}.state", "WorkerGroupState.shutdown", ("self",)),
    PrivateName(
        f"{GROUP}.worker",
        "Worker",
        (
            "actor", "metadata", "resources", "distributed_context", "log_file_path", "placement_group_bundle_index",
        ),
    ),
    PrivateName(
        f"{GROUP}.worker",
        "RayTrainWorker.init_train_context",
        (
            "self", "train_run_context", "distributed_context", "synchronization_actor", "storage_context",
            "worker_callbacks", "controller_actor", "dataset_shard_provider", "checkpoint", "has_validation_fn",
            "current_report_index",
        ),
    ),
    PrivateName(f"{GROUP}.placement_group_handle", "DefaultPlacementGroupHandle", ("pg",)),
    PrivateName(f"{GROUP}.placement_group_handle", "DefaultPlacementGroupHandle.shutdown", ("self",)),
    PrivateName(f"{GROUP}.placement_group_handle", "DefaultPlacementGroupHandle.placement_group"),
    # the barrier between workers, which a pool keeps: ray_train.py replaces the name in this module by its own
    PrivateName(f"{GROUP}.worker_group", "SynchronizationActor"),
    PrivateName(
        f"{V2}.execution.checkpoint.sync_actor",
        "SynchronizationActor.__ray_metadata__.modified_class",
        ("timeout_s", "warn_interval_s"),
    ),
)  # fmt: skip

require(SUPPORTED_RAY, INTERNALS)
