"""What a run would need and do on a machine, without the machine: `plan(config, topology)`."""

from flax_switch.plan.planner import Plan, plan

__all__ = ["Plan", "plan"]
