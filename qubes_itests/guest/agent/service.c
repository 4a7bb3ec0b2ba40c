/* Services: which file or socket serves, and what its configuration says of it. */
#include "agent.h"

#include <arpa/inet.h>
#include <sys/un.h>

#define NAME_CHARACTERS "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_.+@=-"
#define TCP "/dev/tcp"

enum { PLACES = 3 };
/* The first that has it wins. */
static const char *const service_places[PLACES] = {
	"/run/qubes-rpc", "/usr/local/etc/qubes-rpc", "/etc/qubes-rpc"};
static const char *const settings_places[PLACES] = {
	"/run/qubes/rpc-config", "/usr/local/etc/qubes/rpc-config", "/etc/qubes/rpc-config"};

static bool refuse(struct failure *failure, int value, const char *text, const char *name)
{
	failure->value = value;
	snprintf(failure->text, sizeof failure->text, "%s%.256s", text, name);
	return false;
}

static bool name_valid(const char *name)
{
	return strlen(name) < NAME_LIMIT && !strchr(".+-", *name) &&
	       name[strspn(name, NAME_CHARACTERS)] == '\0';
}

/* Whether a path is a link to /dev/tcp/…, which is there for nobody but us. */
static bool is_tcp(const char *path, char target[PATH_LIMIT])
{
	ssize_t length = readlink(path, target, PATH_LIMIT - 1);

	target[length < 0 ? 0 : length] = '\0';
	return strncmp(target, TCP, strlen(TCP)) == 0 && strchr("/", target[strlen(TCP)]);
}

/* Look in all places for SERVICE+ARG, then for SERVICE; without argument the first is
 * SERVICE+. */
static bool find_file(const char *const places[PLACES], const char *name,
                      char path[PATH_LIMIT])
{
	size_t plain = strcspn(name, "+");
	char target[PATH_LIMIT];
	struct stat status;

	for (int i = 0; i < 2 * PLACES; i++) {
		const char *place = in_root(places[i % PLACES]);

		if (i < PLACES)
			snprintf(path, PATH_LIMIT, "%s/%s%s", place, name, name[plain] ? "" : "+");
		else
			snprintf(path, PATH_LIMIT, "%s/%.*s", place, (int)plain, name);
		/* One question for most of the places, which do not have it. */
		if (lstat(path, &status) == 0 &&
		    (!S_ISLNK(status.st_mode) || access(path, F_OK) == 0 || is_tcp(path, target)))
			return true;
	}
	return false;
}

/* One line of a configuration, of which spaces at the end, and a CR, are no part. A
 * string may have quotes, as TOML wants them, or none, as it was before. */
static bool read_setting(char *line, struct service *service)
{
	char key[32], *value, *end, quote;
	size_t length = strlen(line);
	int start = 0;

	while (length && strchr(" \t\r\n", line[length - 1]))
		line[--length] = '\0';
	if (*line == '\0' || *line == '#')
		return true;
	if (sscanf(line, "%31[a-zA-Z0-9._-] = %n", key, &start) != 1 || start == 0)
		return false;
	value = line + start;
	quote = strchr("'\"", *value) ? *value : '\0';
	value += quote != '\0';
	length = quote ? strcspn(value, (char[]){quote, '\0'}) : strcspn(value, " \t#'\"");
	end = value + length;
	if (length == 0 || length >= NAME_LIMIT || (quote && *end != quote))
		return false;
	end += quote != '\0';
	end += strspn(end, " \t");
	if (*end && *end != '#')
		return false;
	value[length] = '\0';
	if (strcmp(key, "force-user") == 0)
		snprintf(service->user, sizeof service->user, "%s", value);
	if (strcmp(key, "skip-service-descriptor") == 0)
		service->bare = strcmp(value, "true") == 0;
	if (strcmp(key, "exit-on-client-eof") == 0)
		service->ends_with_client = strcmp(value, "true") == 0;
	if (strcmp(key, "exit-on-service-eof") == 0)
		service->ends_with_service = strcmp(value, "true") == 0;
	return true;
}

static bool read_settings(const char *name, struct service *service,
                          struct failure *failure)
{
	char path[PATH_LIMIT], line[PATH_LIMIT];
	bool valid = true;
	FILE *file;

	if (!find_file(settings_places, name, path))
		return true;
	if (!(file = fopen(path, "re")))
		return refuse(failure, REFUSED, "cannot be read: ", path);
	while (valid && fgets(line, sizeof line, file))
		valid = read_setting(line, service);
	fclose(file);
	return valid || refuse(failure, REFUSED, "a line that is no setting: ", path);
}

bool service_find(const char *name, struct service *service, struct failure *failure)
{
	struct stat status;

	*service = (struct service){.kind = PROGRAM};
	if (!name_valid(name))
		return refuse(failure, REFUSED, "no name of a service: ", name);
	if (!find_file(service_places, name, service->path))
		return refuse(failure, NOT_FOUND, "there is no service ", name);
	if (!read_settings(name, service, failure))
		return false;
	if (is_tcp(service->path, service->address))
		service->kind = TCP_SERVER;
	else if (stat(service->path, &status) == 0 && S_ISSOCK(status.st_mode))
		service->kind = UNIX_SERVER;
	else if (!S_ISREG(status.st_mode) || !(status.st_mode & 0111))
		return refuse(failure, REFUSED, "neither an executable file nor a socket: ",
		              service->path);
	return true;
}

/* Through a descriptor: addresses of sockets are shorter than paths. */
static int connect_unix(int fd, const char *path)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	int file = open(path, O_PATH | O_CLOEXEC), result;

	snprintf(address.sun_path, sizeof address.sun_path, "/proc/self/fd/%d", file);
	result = file < 0 ? -1 : connect(fd, (struct sockaddr *)&address, sizeof address);
	if (file >= 0)
		close(file);
	return result;
}

/* /dev/tcp/HOST/PORT; what is missing at its end is the argument: PORT, or HOST+PORT,
 * where : is written +. */
static bool tcp_address(char *address, const char *argument, struct sockaddr_in6 *socket)
{
	char text[PATH_LIMIT], *host = text, *port;
	struct sockaddr_in *four = (struct sockaddr_in *)socket;
	int number, end = 0;

	snprintf(text, sizeof text, "%s", address + strlen(TCP));
	if (*text == '\0') {
		snprintf(text, sizeof text, "%s", argument);
		if (!(port = strrchr(text, '+')))
			return false;
		*port++ = '\0';
		for (char *plus = text; (plus = strchr(plus, '+'));)
			*plus = ':';
	} else {
		port = strchr(++host, '/');
		if ((port != NULL) == (*argument != '\0'))
			return false;
		if (port)
			*port++ = '\0';
	}
	if (sscanf(port ? port : argument, "%5d%n", &number, &end) != 1 || number < 1 ||
	    number > UINT16_MAX || (port ? port : argument)[end] != '\0')
		return false;
	*socket = (struct sockaddr_in6){.sin6_family = AF_INET6, .sin6_port = htons((uint16_t)number)};
	if (inet_pton(AF_INET6, host, &socket->sin6_addr) == 1)
		return true;
	*four = (struct sockaddr_in){.sin_family = AF_INET, .sin_port = htons((uint16_t)number)};
	return inet_pton(AF_INET, host, &four->sin_addr) == 1;
}

int service_connect(struct service *service, const char *name, struct failure *failure)
{
	const char *plus = strchr(name, '+');
	struct sockaddr_in6 address = {.sin6_family = AF_UNSPEC};
	bool tcp = service->kind == TCP_SERVER;
	int fd, result;

	if (tcp && !tcp_address(service->address, plus ? plus + 1 : "", &address)) {
		refuse(failure, REFUSED, "not an address and a port: ", service->address);
		return -1;
	}
	fd = socket(tcp ? address.sin6_family : AF_UNIX,
	            SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	result = tcp ? connect(fd, (struct sockaddr *)&address, sizeof address)
	             : connect_unix(fd, service->path);
	if (fd >= 0 && (result == 0 || errno == EINPROGRESS))
		return fd;
	refuse(failure, REFUSED, "it does not answer: ", strerror(errno));
	if (fd >= 0)
		close(fd);
	return -1;
}
