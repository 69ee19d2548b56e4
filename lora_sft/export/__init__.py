"""An adapter → the form in which it is served."""
