"""The command line. The only package that knows Click; one thin file per command."""
