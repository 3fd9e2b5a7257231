"""`blink race`: this project against others' unmodified scripts, on one machine and one data set."""
