#version 330 core
// Silhouettes and depths. Matrix times vector, from the right: a software renderer works through every vertex, and
// products of matrices cost four times as much. lambert.vert must compute gl_Position alike, to the last bit.
layout(location = 0) in vec3 position;

uniform mat4 M;
uniform mat4 V;
uniform mat4 P;

invariant gl_Position;

void main()
{
    gl_Position = P * (V * (M * vec4(position, 1.0)));
}
