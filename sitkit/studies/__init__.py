"""Many runs: crossed, scheduled, searched."""
