UPDATE memories SET retention_s = 86400 WHERE uid = 'm1';
