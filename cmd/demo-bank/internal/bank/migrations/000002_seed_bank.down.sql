-- Nothing: accounts that moved money can't be taken back, and the migration below this one drops them.
SELECT 1;
