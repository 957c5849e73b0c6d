"""Finding source files: `listing` is what is called, `folder_search` looks through folders. Imports no other room."""
