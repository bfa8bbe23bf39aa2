UPDATE memories SET forked_from = 'm1', forked_revision = 2 WHERE uid = 'm3';
