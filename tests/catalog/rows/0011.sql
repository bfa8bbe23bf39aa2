INSERT INTO servers (uid, place, expires_us) VALUES ('s1', 'host 1:2', 1070);
INSERT INTO leases (tenant_uid, server_uid, fence) VALUES ('t1', 's1', 3), ('t2', 'gone', 1);
