"""What a run is made of (`dtypes`, `draft`, `inputs`), what it will need (`plan`), what is done with it when it is trained
(`finished`), and the features that a target gives runs to come (`features`)."""
