"""Why a candidate is not what its source was: causes that are tested on the bytes, never guessed."""
