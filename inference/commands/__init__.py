"""What each command says and takes; its work is imported when there is some to do."""
