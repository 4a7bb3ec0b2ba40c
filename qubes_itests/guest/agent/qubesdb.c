/* The VM's database: the agent publishes it as one file, the clients read that. */
#include "agent.h"

#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

enum { DB_MAX = 262144 };

/* Path, NUL, value, NUL; again and again. */
static char db[DB_MAX];
static size_t db_length;

static char *value_of(char *path)
{
	return path + strlen(path) + 1;
}

static char *next_entry(char *path)
{
	char *value = value_of(path);

	return value + strlen(value) + 1;
}

bool db_set(const char *path, const char *value)
{
	char *end = db + db_length;
	size_t path_size = strlen(path) + 1, value_size = value ? strlen(value) + 1 : 0;

	if (*path != '/' || path_size > NAME_LIMIT)
		return false;
	for (char *entry = db; entry < end; entry = next_entry(entry)) {
		char *next = next_entry(entry);

		if (strcmp(entry, path) != 0)
			continue;
		memmove(entry, next, (size_t)(end - next));
		db_length -= (size_t)(next - entry);
		break;
	}
	if (!value)
		return true;
	if (db_length + path_size + value_size >= DB_MAX)
		return false;
	memcpy(db + db_length, path, path_size);
	memcpy(db + db_length + path_size, value, value_size);
	db_length += path_size + value_size;
	return true;
}

bool db_publish(void)
{
	char temporary[PATH_LIMIT];
	int fd;
	bool written;

	snprintf(temporary, sizeof temporary, "%s.new", in_root(DB_PATH));
	fd = open(temporary, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
	written = fd >= 0 && write(fd, db, db_length) == (ssize_t)db_length;
	if (fd >= 0)
		close(fd);
	return written && rename(temporary, in_root(DB_PATH)) == 0;
}

static bool db_load(void)
{
	ssize_t length = read_file(in_root(DB_PATH), db, sizeof db);

	db_length = length < 0 ? 0 : (size_t)length;
	return length >= 0;
}

/* read PATH…: their values.  list [PREFIX], multiread PREFIX: what is below it. */
int qubesdb_main(int argc, char **argv, const char *command)
{
	bool exact = strcmp(command, "read") == 0, list = strcmp(command, "list") == 0;
	bool full = false, raw = false, found = false;
	const char *prefix;
	int option;

	if (!exact && !list && strcmp(command, "multiread") != 0) {
		fprintf(stderr, "%s: there is no such command\n", argv[0]);
		return 2;
	}
	while ((option = getopt(argc, argv, "frq")) != -1) {
		full = full || option == 'f';
		raw = raw || option == 'r';
		if (option == '?')
			return 2;
	}
	prefix = optind < argc ? argv[optind] : list ? "/" : NULL;
	if (!prefix || !db_load()) {
		fprintf(stderr, prefix ? "%s: there is no database yet\n"
		                       : "usage: %s [-f] [-r] PATH\n", argv[0]);
		return prefix ? 1 : 2;
	}
	for (char *path = db; path < db + db_length; path = next_entry(path)) {
		size_t cut = full ? 0 : strlen(prefix);

		if (exact ? strcmp(path, prefix) != 0 : strncmp(path, prefix, strlen(prefix)) != 0)
			continue;
		found = true;
		if (list)
			puts(path + cut);
		else if (exact)
			printf(raw ? "%s" : "%s\n", value_of(path));
		else
			printf("%s = %s\n", path + cut, value_of(path));
	}
	return found || !exact ? 0 : 1;
}
