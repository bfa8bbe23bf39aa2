UPDATE requests SET memory_uid = 'm1' WHERE request_id = 'r-1';
