"""Places workers on machines by Ray, and says where they are: ``docs/cluster.md`` §6. Untrusted, as they are."""
