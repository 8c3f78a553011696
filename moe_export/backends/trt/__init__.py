"""What the targets ``tensorrt-rtx`` and ``tensorrt`` share: profiles, the child process that builds,
recipes."""
