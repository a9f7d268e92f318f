"""
The command line. `app` parses and answers wrong calls at once; what a command needs is imported when it runs.

Every error is a paragraph that says what, which value and the remedy, with the exit status of `statuses`. May import
everything.
"""
