"""The error that a user can mend."""


class Mistake(ValueError):
    """One line that says what is wrong and what to do; scripts print it alone, without a traceback."""
