#include "model/layer.h"

static int shares(const mq_point *a, const mq_point *b)
{
    return a->site == b->site && a->calib != NULL && mq_calib_same_kind(a->calib, b->calib);
}

int mq_points_begin(mq_point **points, size_t count, mq_error *err)
{
    for (size_t i = 0; i < count; i++) {
        points[i]->leader = -1;
        points[i]->watch = NULL;
    }
    for (size_t i = 0; i < count; i++) {
        mq_point *point = points[i];
        if (point->calib == NULL) continue;
        for (size_t j = 0; j < i && point->leader < 0; j++)
            if (points[j]->leader < 0 && shares(points[j], point)) point->leader = (int)j;
        if (point->leader >= 0) continue;
        point->watch = mq_calib_new(point->calib->kind, point->calib->axis, err);
        if (point->watch != NULL) continue;
        mq_points_end(points, count, 0, NULL);
        return MQ_ERR_MEMORY;
    }
    return MQ_OK;
}

/* A calibrator that sits on several siblings gets their one set of statistics once. */
static int merged_before(mq_point **points, size_t index)
{
    int leader = points[index]->leader < 0 ? (int)index : points[index]->leader;
    for (size_t j = 0; j < index; j++)
        if (points[j]->calib == points[index]->calib && ((int)j == leader || points[j]->leader == leader)) return 1;
    return 0;
}

int mq_points_end(mq_point **points, size_t count, int keep, mq_error *err)
{
    int rc = MQ_OK;
    for (size_t i = 0; i < count && keep && rc == MQ_OK; i++) {
        mq_point *leader = points[i]->leader < 0 ? points[i] : points[points[i]->leader];
        if (points[i]->calib == NULL || merged_before(points, i)) continue;
        rc = mq_calib_merge(points[i]->calib, leader->watch, err);
    }
    for (size_t i = 0; i < count; i++) {
        mq_calib_free(points[i]->watch);
        points[i]->watch = NULL;
        points[i]->leader = -1;
    }
    return rc;
}

int mq_point_collect(mq_point *point, const mq_calib_rows *rows, mq_error *err)
{
    return point->watch == NULL ? MQ_OK : mq_calib_collect(point->watch, rows, err);
}
