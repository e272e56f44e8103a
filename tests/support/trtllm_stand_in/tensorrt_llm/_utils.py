"""Of this process; `LLM` and `_worker` say which rank it is."""

place = (0, 1)


def mpi_rank():
    return place[0]


def mpi_world_size():
    return place[1]
