"""Files of cryo-EM: micrographs, stacks, structures and tables, read strictly."""
