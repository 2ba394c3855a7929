"""A request in the mesh, from its call to the last piece of its answer."""
