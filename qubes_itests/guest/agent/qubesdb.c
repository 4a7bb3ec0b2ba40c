/* The VM's database: one file for each entry, named by its path with ! for /. */
#include "agent.h"

static const char *file_of(const char *path)
{
	static char file[PATH_LIMIT];
	int start = snprintf(file, sizeof file, "%s/", in_root(DB_PATH));

	snprintf(file + start, sizeof file - (size_t)start, "%s", path);
	for (char *slash = file + start; (slash = strchr(slash, '/'));)
		*slash = '!';
	return file;
}

bool db_set(const char *path, const char *value)
{
	const char *file = file_of(path);
	char temporary[PATH_LIMIT];
	ssize_t length = value ? (ssize_t)strlen(value) : -1;
	bool written;
	int fd;

	if (*path != '/' || strlen(path) >= NAME_LIMIT - 1)
		return false;
	if (!value)
		return unlink(file) == 0 || access(file, F_OK) != 0;
	mkdir(in_root(DB_PATH), 0755);
	snprintf(temporary, sizeof temporary, "%s/.new", in_root(DB_PATH));
	fd = open(temporary, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
	written = write(fd, value, (size_t)length) == length;
	close(fd);
	return written && rename(temporary, file) == 0;
}

static bool print_value(const char *path, const char *end)
{
	static char value[65536];

	if (read_file(file_of(path), value, sizeof value) < 0)
		return false;
	printf("%s%s", value, end);
	return true;
}

/* What is below the prefix: paths, with their values or without. */
static void print_below(const char *prefix, bool full, bool values)
{
	struct dirent **entries;
	int count = scandir(in_root(DB_PATH), &entries, NULL, alphasort);

	for (int i = 0; i < count; i++) {
		char *path = entries[i]->d_name;

		for (char *mark = path; (mark = strchr(mark, '!'));)
			*mark = '/';
		if (*path == '/' && strncmp(path, prefix, strlen(prefix)) == 0) {
			printf(values ? "%s = " : "%s\n", path + (full ? 0 : strlen(prefix)));
			if (values)
				print_value(path, "\n");
		}
		free(entries[i]);
	}
	if (count >= 0)
		free(entries);
}

/* read PATH: its value.  list [PREFIX], multiread PREFIX: what is below it. */
int qubesdb_main(int argc, char **argv, const char *command)
{
	bool read = strcmp(command, "read") == 0, list = strcmp(command, "list") == 0;
	bool full = false, raw = false;
	const char *path;
	int option;

	while ((option = getopt(argc, argv, "frq")) != -1) {
		full = full || option == 'f';
		raw = raw || option == 'r';
		if (option == '?')
			return 2;
	}
	path = optind < argc ? argv[optind] : list ? "/" : NULL;
	if (!path || (!read && !list && strcmp(command, "multiread") != 0)) {
		fputs("usage: qubesdb-{read,list,multiread} [-f] [-r] PATH\n", stderr);
		return 2;
	}
	if (read)
		return print_value(path, raw ? "" : "\n") ? 0 : 1;
	print_below(path, full, !list);
	return 0;
}
