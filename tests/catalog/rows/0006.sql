UPDATE tenants SET deleting_us = 1060 WHERE uid = 't2';
