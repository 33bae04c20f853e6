"""Photos in, pseudo pairs out: the stages that run as Ray Data pipelines, and their stores."""
