"""Does privet train the models that people train? Each is built tiny, and compared with one example at a time."""
