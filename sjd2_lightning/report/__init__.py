"""Tables, figures, pages and logs of an evaluation."""
