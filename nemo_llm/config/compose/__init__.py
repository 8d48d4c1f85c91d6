"""From the command line and ``conf/`` to a `RunConfig`, and from one that was saved."""
