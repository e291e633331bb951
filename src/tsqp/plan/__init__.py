"""What a cluster would give, from measured constants and a model's shape: ``docs/scaling.md``. No weight is read."""
