"""An adapter → the form in which it is served; one file a target."""
